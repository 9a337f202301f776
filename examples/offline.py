"""Ask the embedded model two questions, without a server: `python examples/offline.py`."""

from fathom.api import ChatRequest, Delta, SamplingParams
from fathom.cli.session import open_chat


def main() -> None:
    chat = open_chat("small")
    params = SamplingParams(temperature=0, max_tokens=200)

    first = ChatRequest(messages=[{"role": "user", "content": "hello"}], effort="none", params=params)
    answer = chat.chat(first)
    print(answer.text)

    turn = [*first.messages, answer.message(), {"role": "user", "content": "What is 17 + 25?"}]
    for piece in chat.stream(ChatRequest(messages=turn, effort="max", params=params)):
        if isinstance(piece, Delta):
            print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
