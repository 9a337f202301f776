"""Writes docs/conformance.md from the cases below and the tests that carry their numbers.

`python -m tests.server.conformance` after a change; a test fails while the page is not what this writes.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "conformance.md"

CASES: dict[int, str] = {
    1: "`models.list()`",
    2: "`/models` under every path",
    3: "no key where keys are asked for: 401",
    4: "an answer without thinking",
    5: "the same under every base path",
    6: "unknown and foreign model names",
    7: "malformed JSON; the connection stays usable",
    8: "unknown fields are ignored",
    9: "no messages",
    10: "`max_tokens` out of range, and at its end",
    11: "`/user/balance`",
    12: "the golden prompts, by digest and token count",
    13: "`tool_choice: none` renders no tools",
    14: "every effort in both prompt dialects",
    15: "tools and keys stay in the order received",
    16: "tool results in the order of the calls",
    17: "a leading `developer` message is the system's",
    18: "several system messages",
    19: "control tokens spelled in client text",
    20: "thinking by default",
    21: "`thinking: disabled`",
    22: "effort `none`",
    23: "disabled wins over an effort",
    24: "an unknown effort",
    25: "`chat_template_kwargs`",
    26: "reasoning and content exactly as sampled",
    27: "cut while thinking",
    28: "a stray `</think>`",
    29: "a second `<think>`",
    30: "earlier reasoning is dropped without tools",
    31: "missing reasoning with tools: accepted, or the exact refusal",
    32: "temperature 0 while thinking",
    33: "order of a stream, and the same text as not streamed",
    34: "every cut point of markup",
    35: "text that looks like the beginning of markup at the end",
    36: "characters of several tokens",
    37: "`include_usage`",
    38: "usage without `include_usage`",
    39: "signs of life in a stream",
    40: "signs of life before a body",
    41: "a disconnect frees the place",
    42: "stop strings",
    43: "log probabilities",
    44: "`stream_options` without a stream",
    45: "a tool call: id, JSON, types",
    46: "two calls in one block",
    47: "long arguments come in pieces",
    48: "strings that look like markup",
    49: "text before the block",
    50: "a block inside the reasoning",
    51: "calls without parameters",
    52: "invalid JSON in a parameter",
    53: "cut inside a value",
    54: "broken blocks",
    55: "each prompt of a tool loop extends the last",
    56: "forced calls, thinking or not",
    57: "strict tools",
    58: "results without a call, results in parts",
    59: "128 tools, 129 tools",
    60: "`json_object` while thinking",
    61: "`json_schema` and `.parse()`",
    62: "prefix completion",
    63: "a long prompt twice",
    64: "a short prompt twice",
    65: "a turn appended",
    66: "a common beginning",
    67: "users are apart",
    68: "a restart",
    69: "a changed effort",
    70: "the billing header",
    71: "Messages: an answer",
    72: "Messages: kinds of thinking",
    73: "Messages: order of a stream",
    74: "Messages: a call in a stream",
    75: "Messages: a call sent back in every form",
    76: "Messages: what agents send",
    77: "Messages: `count_tokens`",
    78: "Messages: stop sequences",
    79: "Messages: one token",
    80: "Messages: wrong key, unknown model, overload, a fault in a stream",
    81: "Messages: either key header",
    82: "Messages: beta headers and query",
    83: "Messages: forced and forbidden calls",
    84: "Responses: an answer",
    85: "Responses: a stream",
    86: "Responses: a loop of calls",
    87: "Responses: cut by length",
    88: "Responses: fields that are ignored",
    89: "Responses: `apply_patch` and other custom tools",
    90: "Responses: a schema",
    91: "a prompt longer than the context",
    92: "more requests than places",
    93: "short chats while a long prompt is read",
    94: "damaged cache files",
    95: "an answer that does not begin",
}

NOTES: dict[int, str] = {
    12: "g17: the answer header stays behind the reminder. g21: as case 17, a developer is the system",
    15: "the library writes the tool object anew (name, description, parameters); inside `parameters` all stays",
    19: "always safe; there is no switch",
    24: "400",
    26: "newlines beside the border of reasoning and content are trimmed, as the library does",
    31: "lenient; `--strict-deepseek-compat` gives the hosted text",
    38: "usage rides on the closing chunk, always",
    42: "not sought in reasoning or arguments; a tool block wins",
    44: "ignored; refused under `--strict-deepseek-compat`",
    45: "the id may hold `ET_`, where a turn thought of nothing",
    52: "the value is handed on as a string",
    54: "the markup is dropped, the text stays",
    56: "a call comes; `--strict-deepseek-compat` gives the hosted refusal while thinking",
    57: "our own check of the schema",
    69: "the embedded model's dialect: only `max` adds text",
    93: "at full length by `pytest -m external`",
    94: "the kills themselves are in tests/engine",
}

HEAD = """# Conformance

What clients of the three dialects may count on: 95 cases, each a test that drives a server on a real port with the
`openai` or `anthropic` client (or plain HTTP where no client would send it). Behind the server stands a scripted
engine, or the embedded model where something must really be computed. All of them pass; `make test` runs them. Where
several behaviours would be right, the last column says which one is ours.

Written by `python -m tests.server.conformance`.

| case | what | tests | our choice |
| ---: | --- | --- | --- |
"""

TAIL = """
## At full length

What `make test` runs in a shorter form, as last run at full length (2026-11-28, two cores that others used as well).

| what | command | measured |
| --- | --- | --- |
"""

FULL = (
    (
        "nothing leaks: random completions, well-formed and broken, through three protocols, streamed and whole",
        "make fuzz",
        "10,000, no leak, streamed as whole",
    ),
    (
        "bodies drawn from our description for ten minutes",
        "FATHOM_FUZZ_SECONDS=600 pytest -m external tests/server/test_clients.py -k schemathesis",
        "4,329, no status 500, no place taken",
    ),
    (
        "valid bodies with one or two values replaced",
        "FATHOM_FUZZ_BODIES=1500 pytest tests/server/test_mutated_bodies.py",
        "6,000, each answered or refused",
    ),
    (
        "LiteLLM 1.110, langchain-openai 1.7, llm 0.36: an answer, a stream, a call",
        "pytest -m external tests/server/test_clients.py",
        "each sees what was said",
    ),
    ("random workloads of the scheduler, every step checked", "pytest tests/engine/test_scheduler.py", "2,510"),
    (
        "the same bits: 20 workloads of 60 prompts, each cold and alone, then in company; from the device; "
        "from memory, pre-empted; from the disk after a restart",
        "pytest -m external tests/engine/test_engine.py",
        "4,800 answers, 81,136 tokens and their log probabilities, all equal",
    ),
    (
        "the same bits: conversations that grow, branch and are edited, through evictions, restarts and damaged files",
        "pytest -m external tests/engine/test_prefix.py",
        "1,333 prompts of 40 trees; 238,080 tokens reused, 211 restarts, 581 damaged files",
    ),
    (
        "`kill -9` of two processes that write one cache",
        "pytest -m external tests/engine/test_disk.py",
        "50 times; 6,509 entries read, none wrong; 50 unfinished files passed over",
    ),
    (
        "case 93: eight chats that begin while 200,000 tokens are read",
        "pytest -m external tests/server/test_cases_limits.py",
        "no piece more than 0.49, 0.58 and 0.68 s after the one before, in three runs (two cores)",
    ),
)
"""What is proved, by what command, and what it measured."""


def found() -> dict[int, list[str]]:
    """The files with tests of each case; a name has one case (`test_case_12_`) or a range (`test_cases_21_to_23_`)."""
    tests: dict[int, list[str]] = {}
    for file in sorted(HERE.glob("test_*.py")):
        names = [n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)]
        numbers = (re.match(r"test_cases?_(\d+)(?:_to_(\d+))?_", name) for name in names)
        for match in filter(None, numbers):
            for case in range(int(match[1]), int(match[2] or match[1]) + 1):
                tests.setdefault(case, []).append(file.name)
    return tests


def page() -> str:
    """The whole page. Raises KeyError for a test of an unknown case."""
    tests = found()
    assert set(tests) <= set(CASES)
    rows = []
    for case, what in CASES.items():
        files = dict.fromkeys(tests.get(case, ()))
        links = ", ".join(f"{tests[case].count(f)} in [{f}](../tests/server/{f})" for f in files)
        rows.append(f"| {case} | {what} | {links or 'none'} | {NOTES.get(case, '')} |")
    full = [f"| {what} | `{command}` | {measured} |" for what, command, measured in FULL]
    return HEAD + "\n".join(rows) + "\n" + TAIL + "\n".join(full) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
