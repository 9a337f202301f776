"""Other people's clients against our server, once each; each is installed into an environment of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.harness import PARIS, Site, block

pytestmark = pytest.mark.external

LITELLM = """
import json, os, litellm
url = os.environ["SITE"] + "/v1"
asked = [{"role": "user", "content": "Hi"}]
common = dict(model="openai/deepseek-v4-flash", api_base=url, api_key="none", messages=asked)
whole = litellm.completion(**common).choices[0].message
pieces = [c.choices[0].delta for c in litellm.completion(stream=True, **common)]
tool = json.loads(os.environ["TOOL"])
call = litellm.completion(tools=[tool], **common).choices[0].message.tool_calls[0].function
print(json.dumps([whole.content, whole.reasoning_content, "".join(p.content or "" for p in pieces),
                  call.name, json.loads(call.arguments)]))
"""

LANGCHAIN = """
import json, os
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="deepseek-v4-flash", base_url=os.environ["SITE"] + "/v1", api_key="none")
whole = chat.invoke("Hi").content
pieces = "".join(p.content for p in chat.stream("Hi"))
call = chat.bind_tools([json.loads(os.environ["TOOL"])]).invoke("Hi").tool_calls[0]
print(json.dumps([whole, "Let me see.", pieces, call["name"], call["args"]]))
"""

LLM_TOOL = """
import json, os, pathlib, llm
folder = pathlib.Path(os.environ["LLM_USER_PATH"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "extra-openai-models.yaml").write_text(
    "- model_id: ours\\n  model_name: deepseek-v4-flash\\n  supports_tools: true\\n"
    f"  api_base: {os.environ['SITE']}/v1\\n  api_key_name: none\\n"
)
model = llm.get_model("ours")
model.key = "none"
whole = model.prompt("Hi", stream=False).text()
pieces = "".join(model.prompt("Hi"))
def get_weather(city: str, days: int) -> str:
    return "18C"
call = model.prompt("Hi", tools=[get_weather], stream=False).tool_calls()[0]
print(json.dumps([whole, "Let me see.", pieces, call.name, call.arguments]))
"""

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}

CLIENTS = {
    "litellm": (["litellm", "mcp"], LITELLM),
    "langchain": (["langchain-openai"], LANGCHAIN),
    "llm": (["llm"], LLM_TOOL),
}
"""What to install, and a program that asks for an answer, a stream and a call, and prints what it saw."""


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_talks_streams_and_calls(site: Site, tmp_path: Path, name: str) -> None:
    packages, program = CLIENTS[name]
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, timeout=600)
    called = "Look it up.</think>" + block(PARIS)
    site.script("Let me see.</think>It is four.", "Let me see.</think>It is four.", called)
    home = {"SITE": site.url, "TOOL": json.dumps(TOOL), "LLM_USER_PATH": str(tmp_path / "llm")}
    home |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [python, "-c", program], env=os.environ | home, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = ["It is four.", "Let me see.", "It is four.", "get_weather", {"city": "Paris", "days": 2}]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def test_schemathesis_finds_no_fault(site: Site, tmp_path: Path, say: Callable[[str], None]) -> None:
    """Requests drawn from our OpenAPI description: nothing answers 500, and no place stays taken.

    `FATHOM_FUZZ_SECONDS=600` draws for ten minutes.
    """
    seconds = os.environ.get("FATHOM_FUZZ_SECONDS", "60")
    site.script("Let me see.</think>It is four.")
    command = ["schemathesis", "run", site.url + "/openapi.json", "--checks", "not_a_server_error"]
    command += ["--max-time", seconds, "--request-timeout", "20", "--seed", "1"]
    installed = Path(sys.executable).with_name("schemathesis")
    if not installed.exists():
        venv.create(tmp_path / "env", with_pip=True)
        installed = tmp_path / "env" / "bin" / "schemathesis"
        subprocess.run([installed.with_name("python"), "-m", "pip", "install", "-q", "schemathesis"], check=True)
    done = subprocess.run([installed, *command[1:]], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    status = site.relay.inner.status()
    assert status.running == status.waiting == 0
    assert site.chat().status_code == 200
    found = re.search(r"\d+ generated, \d+ passed", done.stdout)
    say(f"schemathesis: {seconds} s, {found[0] if found else 'nothing generated'}, no status 500, no place taken")
