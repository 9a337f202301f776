"""Train a very small V4, export it in the official layout, and ask it something (it will not know much yet).

python examples/train_tiny.py FOLDER [STEPS]
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from fathom.api import ChatRequest, SamplingParams
from fathom.cli.session import open_chat
from fathom.config import WEIGHTS
from fathom.train.export import export
from fathom.train.recipes import recipe
from fathom.train.render import open_renderer
from fathom.train.trainer import Trainer


def main(folder: Path, steps: int) -> None:
    config = recipe("tiny")
    config = replace(config, schedule=replace(config.schedule, steps=steps))
    tokenizer = WEIGHTS / "small"
    trainer = Trainer(config, folder, partial(open_renderer, tokenizer))
    trainer.train()
    export(trainer.model, tokenizer, folder / "model")

    question = [{"role": "user", "content": "hello"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    answer = open_chat(str(folder / "model")).chat(ChatRequest(messages=question, effort="none", params=params))
    print(f"{answer.usage.completion_tokens} tokens: {answer.text!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20)
