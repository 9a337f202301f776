"""A request of Chat Completions, Messages or Responses: prompt ids, sampling, guide, writer. Reference recipe 2-4."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fathom.api import GenerateRequest, SamplingParams
from fathom.encoding import normalise, wishes
from fathom.encoding.answer import AnswerWriter, Form
from fathom.encoding.body import shown
from fathom.encoding.conversation import library
from fathom.encoding.desk import Desk
from fathom.encoding.dialect import Dialect
from fathom.encoding.exchange import Exchange
from fathom.encoding.grammar import Function, Grammars
from fathom.encoding.guide import AnswerGuide
from fathom.encoding.layout import Rebuilding, behind_header, spliced
from fathom.encoding.replay import Said, Turn
from fathom.encoding.tokenizer import DSML, END_OF_THINKING
from fathom.errors import ContextError, PromptError, RequestError, SamplingError

_REQUESTS = {"chat": "ChatCompletionRequest", "messages": "MessagesRequest", "responses": "ResponsesRequest"}

_LIBRARY_MODEL = "DeepSeek-V4-Pro"
"""The name under which the library renders V4; clients' names are mapped before."""

_APRIL = {"low": "low", "high": "low", "xhigh": "low", "max": "high"}
"""What April's checkpoints are told for each level of the library, which speaks 0813."""


class Conversing(Exchange):
    """Chat Completions, Messages, Responses."""

    def __init__(self, protocol: str, body: dict[str, Any], desk: Desk, key: str) -> None:
        self.protocol, self.desk, self.key = protocol, desk, key
        self.model = desk.model(body.get("model"), protocol)
        self.budget = None if desk.strict else wishes.budget(body)
        self._format = wishes.json_format(body) if protocol == "messages" and not desk.strict else None
        body = normalise.NORMALISERS[protocol]({**body, "model": _LIBRARY_MODEL}, desk.strict)
        self.forced = None if desk.strict else wishes.take_choice(body, protocol)
        self._keep_thinking = bool(body.pop(normalise.KEEP_THINKING, False))
        self._strict = frozenset(body.pop(normalise.STRICT_TOOLS, ()))
        self._task = wishes.take_task(body) if protocol == "chat" else None
        self.user = wishes.user(body, protocol, desk.users)
        self._body = body
        self._request = self._converted(body)
        self.options = self._request.parsing_options
        self.options.parse_json_output = False
        self.stream = self._request.stream
        self._lay_out()
        self.params = self._params(body)
        self.guide = self._guide()

    @property
    def namespace(self) -> str:
        """Who shares prefixes with this request."""
        return json.dumps([self.desk.codec.settings.dialect, self.key, self.user])

    def generate(self) -> GenerateRequest:
        """For the engine."""
        return GenerateRequest(
            prompt_ids=self.prompt_ids,
            params=self.params,
            guide=self.guide,
            namespace=self.namespace,
            keep=self._keep(),
        )

    def writer(self, identity: str) -> AnswerWriter:
        """Writes the answer. Once."""
        form = Form(
            protocol=self.protocol,
            generator=self._generator(identity),
            options=self.options,
            identity=identity,
            model=self.model,
            thinking=self.thinking,
            in_block=self.options.starts_in_tool_calls,
            tools=self._tools_allowed(),
            logprobs=self.params.logprobs is not None,
        )
        return AnswerWriter(self.desk.codec, form)

    def remember(self, writer: AnswerWriter) -> None:
        """Keep the sampled ids under the ids of the calls, and under what was said."""
        codec, message, given = self.desk.codec, writer.message(), self._request.conversation.messages
        if self._task:
            return
        begun, thinking = behind_header(codec, self.prompt_ids)
        ids = [*begun, *writer.ids]
        if thinking and codec.tokenizer.added[END_OF_THINKING] not in ids:
            return
        begin = given[-1] if given and given[-1].role == "assistant" else None
        text = (begin.content if begin else "") + message["content"]
        reasoning = ((begin.reasoning_content or "") if begin else "") + (message.get("reasoning_content") or "")
        calls = message.get("tool_calls", ())
        named = tuple((call["function"]["name"], call["function"]["arguments"]) for call in calls)
        said = Said(text, reasoning, named)
        turn = Turn.of(ids, thinking, said)
        self.desk.replay.remember(self._scope, self._question, [call["id"] for call in calls], said, turn)

    @property
    def _scope(self) -> str:
        """Who may be given ids of this answer: the same client, with the same vocabulary."""
        return json.dumps([self.desk.codec.tokenizer.digest, self.key, self.user])

    # --- the conversation

    def _converted(self, body: Mapping[str, Any]) -> Any:
        recipe = library()
        options = recipe.ConversionOptions(messages_web_search=recipe.WebSearchBehavior.Drop)
        if self.desk.strict:
            options = options.with_reasoning_content_behavior(recipe.ReasoningContentBehavior.Reject)
        kind = getattr(recipe, _REQUESTS[self.protocol])
        raw = json.dumps(body).encode()
        try:
            request = kind(raw)
            if self.protocol == "responses":
                self._echo, self._spaces = request.echo(), kind(raw).namespace_tool_map(options)
            return request.convert(options)
        except recipe.ConversionError as error:
            raise _refused(error) from None
        except ValueError as error:
            raise RequestError(400, f"Failed to deserialize the JSON body: {error}") from None

    def _lay_out(self) -> None:
        """The prompt's ids, turns sampled here as they were sampled."""
        recipe, codec = library(), self.desk.codec
        given = self._request.conversation.messages
        self._prefilled = self.protocol == "messages" and bool(given) and given[-1].role == "assistant"
        rebuilding = Rebuilding(self._known, self._request.conversation.thinking_mode, self._prefilled)
        rebuilt = self._with_settings(self._request.conversation, rebuilding.messages(given))
        self._question = rebuilding.question
        try:
            rendered = codec.render_conversation(rebuilt)
        except (RuntimeError, ValueError) as error:
            raise PromptError(str(error)) from None
        self.desk.bounded(rendered.prompt)
        self.prompt_ids = spliced(codec, rendered, rebuilding.turns, self._keep_thinking)
        stage = self.options.thinking_initial_stage
        self.thinking = bool(stage and stage.starts_in_reasoning())
        if rendered.prompt.endswith(f"<{DSML}tool_calls>\n"):
            self.options.starts_in_tool_calls, self.thinking = True, False
        elif self._prefilled:
            inside = self._request.conversation.thinking_mode and not given[-1].content
            stages = recipe.ThinkingInitialStage
            stage = stages.ReasoningContinuation if inside else stages.ContentContinuation
            self.options.thinking_initial_stage, self.thinking = stage, inside
        if self._task:
            self._ask_task(self._task)

    def _ask_task(self, task: str) -> None:
        """A quick instruction: its token takes the place of the answer's header, or follows it. Reference api A.10."""
        token = self.desk.codec.tokenizer.added.get(f"<｜{task}｜>")
        if token is None:
            raise RequestError(400, f"task '{task}' is unknown to this model: leave it out", param="task")
        self.prompt_ids = [*(self.prompt_ids if task == "action" else self.prompt_ids[:-2]), token]
        self.options.thinking_initial_stage, self.thinking = None, False

    def _with_settings(self, given: Any, messages: Sequence[Any]) -> Any:
        effort, april = given.reasoning_effort, self.desk.codec.settings.dialect is Dialect.APRIL
        choice = given.tool_choice
        if self.forced is not None and not given.thinking_mode:
            choice = "required"
        told = {"response_schema": given.response_schema} if given.response_format == "json_schema" else {}
        if given.response_format == "json_object":
            told = {"response_format": "json_object"}
        elif self._format is not None:
            told = {"response_schema": self._format}
        tools = given.tools
        if self.forced and not given.thinking_mode:
            tools = [tool for tool in tools if tool.name in self.forced]
        return library().Conversation(
            messages,
            thinking_mode=given.thinking_mode,
            tools=tools or None,
            tool_choice=choice,
            reasoning_effort=_APRIL.get(effort, effort) if april and effort else effort,
            **told,
        )

    def _known(self, question: str, message: Any) -> Turn | None:
        """The turn as it was sampled; or as it was sent, where its thinking is to stay in the prompt."""
        calls = tuple((call.name, call.arguments) for call in message.tool_calls or ())
        said = Said(message.content, message.reasoning_content, calls)
        if self._keep_thinking and said.reasoning and not calls:
            tokenizer = self.desk.codec.tokenizer
            end = tokenizer.added[END_OF_THINKING]
            reasoning, text = map(self.desk.bounded, (said.reasoning, said.text))
            return Turn.of([*tokenizer.encode(reasoning), end, *tokenizer.encode(text)], True, said)
        return self.desk.replay.find(self._scope, question, [call.id for call in message.tool_calls or ()], said)

    # --- sampling

    def _params(self, body: Mapping[str, Any]) -> SamplingParams:
        options, settings = self._request.inference_options, self.desk.codec.settings
        strict = self.desk.strict
        temperature = options.temperature if strict else body.get("temperature", settings.temperature)
        top_p = options.top_p if strict else body.get("top_p", settings.top_p)
        try:
            return SamplingParams(
                temperature=float(temperature),
                top_p=float(top_p) or 1e-9,
                top_k=wishes.top_k(body),
                max_tokens=self._max_tokens(options.max_tokens),
                seed=options.seed,
                logprobs=(options.top_logprobs or 0) if options.logprobs else None,
            )
        except (SamplingError, TypeError, ValueError) as error:
            raise RequestError(400, str(error)) from None

    def _max_tokens(self, asked: int | None) -> int:
        prompt, context = len(self.prompt_ids), self.desk.context
        if prompt >= context:
            limit = f"the prompt has {prompt} tokens, but the context holds {context} with the answer"
            raise ContextError(f"{limit}: shorten it, or allow a longer context")
        if asked is not None and prompt + asked > context and self.desk.strict:
            raise ContextError(
                f"the prompt has {prompt} tokens and max_tokens is {asked}: together more than {context}"
            )
        usual = self._request.resolve_max_tokens(0, 1 << 31) if asked is None else asked
        own = self.desk.codec.settings.max_tokens
        if asked is None and own is not None:
            usual = min(usual, own)
        return int(min(usual, context - prompt))

    def _guide(self) -> AnswerGuide:
        grammars, schema = self.desk.codec.grammars, self._schema()
        if self._tools_allowed():
            return self._call_guide(grammars, schema)
        matcher = grammars.json(schema) if schema is not None else None
        return AnswerGuide(grammars, thinking=self.thinking, budget=self.budget, matcher=matcher)

    def _schema(self) -> Any:
        """What the answer must be as JSON; None if it may be any text."""
        given = self._request.conversation
        if given.response_format == "json_object":
            return {"type": "object"}
        schema = given.response_schema if given.response_format == "json_schema" else self._format
        if schema is not None and not isinstance(schema, dict):
            raise RequestError(400, f"a schema must be an object, not {shown(schema)}")
        return schema

    def _call_guide(self, grammars: Grammars, schema: Any) -> AnswerGuide:
        """A forced call begins the answer; one of the model's own will is held to its form once it has begun. Where
        JSON is wanted, the answer is that or calls, without a word beside them.
        """
        tools = self._request.conversation.tools
        chosen = [tool for tool in tools if not self.forced or tool.name in self.forced]
        functions = [Function(t.name, t.parameters or {}, t.name in self._strict) for t in chosen]
        in_block = self.options.starts_in_tool_calls
        forced = self.forced is not None or in_block
        try:
            if forced or schema is not None:
                opening = "" if in_block else grammars.opening(whole=True)
                matcher = grammars.calls(functions, opening, None if forced else schema)
                return AnswerGuide(grammars, thinking=self.thinking, budget=self.budget, matcher=matcher)
            calls = grammars.calls(functions, grammars.opening(whole=False))
        except RequestError:
            if forced or schema is not None or any(function.strict for function in functions):
                raise
            calls = None  # a schema that cannot be enforced: the model is trusted, the guard still reads
        return AnswerGuide(grammars, thinking=self.thinking, budget=self.budget, calls=calls)

    def _tools_allowed(self) -> bool:
        given = self._request.conversation
        return bool(given.tools) and given.tool_choice != "none"

    def _keep(self) -> tuple[int, ...]:
        """Where the last turn of the user begins: the next prompt may part from this one there."""
        user, ids = self.desk.codec.tokenizer.added["<｜User｜>"], self.prompt_ids
        return (len(ids) - 1 - ids[::-1].index(user) if user in ids else 0,)

    def _generator(self, identity: str) -> Any:
        recipe = library()
        made = getattr(recipe, _REQUESTS[self.protocol]).chunk_generator(self._request, identity, self.model)
        if self.protocol == "responses":
            made = made.with_echo(self._echo)
            made = made.with_namespace_tool_map(self._spaces) if self._spaces else made
        return made


def _refused(error: Any) -> RequestError:
    """The library's own refusal, which is an OpenAI error body."""
    try:
        found = json.loads(error.body)["error"]
    except (ValueError, KeyError, TypeError):
        return RequestError(error.status_code, str(error))
    return RequestError(
        error.status_code, found.get("message", ""), found.get("type") or "invalid_request_error", found.get("code")
    )
