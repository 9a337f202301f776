"""Ask a running server (`make serve`) in two dialects: `python examples/client.py [URL]`. Needs both SDKs."""

import sys

from anthropic import Anthropic
from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
question = {"role": "user", "content": "What is 17 + 25?"}

chat = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions
for chunk in chat.create(model="small", messages=[question], stream=True, temperature=0):
    for choice in chunk.choices:
        thought = getattr(choice.delta, "reasoning_content", None)
        print(f"({thought})" if thought else choice.delta.content or "", end="", flush=True)
print()

tool = {
    "name": "get_time",
    "description": "The time in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
asked = [{"role": "user", "content": "What time is it in Paris?"}]
messages = Anthropic(base_url=f"{url}/anthropic", api_key="none").messages
answer = messages.create(model="small", max_tokens=200, messages=asked, tools=[tool], extra_body={"temperature": 0})
for block in answer.content:
    print(f"{block.name}({block.input})" if block.type == "tool_use" else f"[{block.type}]")
