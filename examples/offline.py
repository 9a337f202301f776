"""The embedded model without a server: a greeting, a question with thinking, a tool call.

python examples/offline.py
"""

import sys

from fathom.api import ChatRequest, Delta, SamplingParams
from fathom.cli.session import open_chat

PARAMS = SamplingParams(temperature=0, max_tokens=200)
WEATHER = {
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def main() -> None:
    chat = open_chat("small")
    hello = ChatRequest(messages=[{"role": "user", "content": "hello"}], effort="none", params=PARAMS)
    print(chat.chat(hello).text)

    sum_ = ChatRequest(messages=[{"role": "user", "content": "What is 17 + 25?"}], effort="max", params=PARAMS)
    for piece in chat.stream(sum_):
        if isinstance(piece, Delta):
            print(piece.thinking, end="", file=sys.stderr, flush=True)
            print(piece.text, end="", flush=True)
    print()

    ask = [{"role": "user", "content": "What is the weather in Paris?"}]
    tools = [{"type": "function", "function": WEATHER}]
    for call in chat.chat(ChatRequest(messages=ask, tools=tools, effort="high", params=PARAMS)).tool_calls:
        print(call.name, call.arguments)


if __name__ == "__main__":
    main()
