// The page: what is said, how it streams in, what it costs. Nothing from a model, a tool or a person is ever parsed as
// HTML: every string becomes a text node.
import { render } from "./text.js";
import { Load } from "./load.js";

const $ = (id) => document.getElementById(id);
const element = (name, className = "", text = "") => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
};
const dollars = (x) => (x === 0 ? "$0" : x >= 0.01 ? `$${x.toFixed(2)}` : `$${x.toPrecision(2)}`);

let messages = []; // as sent to the server; the index of a message is the index of its list item
let running = null; // the AbortController of the answer under way
let server = { model: "", context: Infinity, price: null };
const figures = new WeakMap(); // the finished Answer of a message, if its usage is known
let bill = { total: 0, partly: false }; // USD since "New", retried answers included; whether some of it is not known

// ---- the server

const headers = () => {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
};

async function* events(response) {
  const decoder = new TextDecoder();
  let held = "";
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    held += decoder.decode(value, { stream: !done });
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    if (done) return;
  }
}

const complaint = (body, status) => body?.error?.message || `The server answered with status ${status}.`;

async function ask(body, signal) {
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (response.status === 401) $("settings").open = true;
  if (!response.ok) throw new Error(complaint(await response.json().catch(() => null), response.status));
  return events(response);
}

/** What the next answer goes on from: an answer of which nothing came was none. */
const said = () => messages.filter((m) => m.role !== "assistant" || m.content || m.tool_calls);

function request() {
  const system = $("system").value.trim();
  const effort = document.querySelector("input[name=effort]:checked").value;
  const body = {
    model: server.model, stream: true, stream_options: { include_usage: true },
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said()],
    thinking: { type: effort === "none" ? "disabled" : "enabled" },
  };
  if (effort !== "none") body.reasoning_effort = effort;
  const tools = $("tools").value.trim();
  if (tools) body.tools = JSON.parse(tools);
  return body;
}

// ---- one answer

class Answer {
  constructor() {
    this.message = { role: "assistant", content: "", reasoning_content: "" };
    this.item = element("li", "assistant");
    this.thinking = element("details", "thinking");
    this.summary = this.thinking.appendChild(element("summary", "", "Thinking…"));
    this.thought = this.thinking.appendChild(element("div"));
    this.text = element("div", "text waiting");
    this.calls = element("div");
    this.foot = element("div", "foot");
    this.thinking.hidden = true;
    this.item.append(this.thinking, this.text, this.calls, this.foot);
    this.begun = performance.now();
    this.first = null;
    this.bill = bill;
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices?.[0];
    if (chunk.usage) this.usage = chunk.usage;
    if (!choice) return;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    const { reasoning_content: thought, content, tool_calls: calls } = choice.delta;
    if (thought || content || calls) this.first ??= performance.now();
    if (thought) this.think(thought);
    if (content) this.say(content);
    for (const call of calls || []) this.call(call);
  }

  think(text) {
    this.thinking.hidden = false;
    this.message.reasoning_content += text;
    this.thought.append(text);
    this.thought.scrollTop = this.thought.scrollHeight;
  }

  say(text) {
    this.endThinking();
    this.message.content += text;
    this.text.replaceChildren(...render(this.message.content));
  }

  call({ index, id, function: part }) {
    this.endThinking();
    const calls = (this.message.tool_calls ??= []);
    calls[index] ??= { id, type: "function", function: { name: part.name, arguments: "" } };
    calls[index].function.arguments += part.arguments || "";
    const box = this.calls.children[index] ?? this.calls.appendChild(callBox(part.name));
    box.querySelector("pre").textContent = calls[index].function.arguments;
  }

  endThinking() {
    if (this.thoughtFor || this.thinking.hidden) return;
    this.thoughtFor = (performance.now() - this.begun) / 1000;
    this.summary.textContent = `Thought for ${this.thoughtFor.toFixed(1)} s`;
  }

  end(problem) {
    this.endThinking();
    this.text.classList.remove("waiting");
    const seconds = (this.ended - (this.first ?? this.begun)) / 1000;
    this.foot.append(...this.remarks(problem, seconds));
    if (problem) this.foot.classList.add("error");
    const retry = element("button", "", "Retry");
    retry.addEventListener("click", () => again(messages.indexOf(this.message)));
    this.foot.append(retry);
    if (!this.message.reasoning_content) delete this.message.reasoning_content;
    if (problem) delete this.message.tool_calls; // may be cut short: shown, but neither answered nor sent back
    $("announce").textContent = problem || this.message.content || "The model calls a tool.";
  }

  remarks(problem, seconds) {
    const said = [];
    if (problem) said.push(problem);
    if (this.finish === "length") said.push("Cut: the longest answer was reached.");
    if (this.finish === "content_filter" || this.finish === "insufficient_system_resource") said.push(`Ended: ${this.finish}.`);
    if (this.usage) {
      const tokens = this.usage.completion_tokens;
      this.speed = seconds > 0 && tokens > 1 ? (tokens - 1) / seconds : 0;
      said.push(`${tokens} tokens`, `first after ${(((this.first ?? this.begun) - this.begun) / 1000).toFixed(2)} s`);
    }
    return said.map((text) => element("span", "", text));
  }
}

function callBox(name) {
  const box = element("div", "call");
  box.append(element("strong", "", `Calls ${name}`), element("pre"));
  return box;
}

// ---- the conversation

function userItem(message) {
  const item = element("li", "user");
  const foot = element("div", "foot");
  const edit = element("button", "", "Edit");
  edit.addEventListener("click", () => {
    $("input").value = message.content;
    cut(messages.indexOf(message));
    grow();
    $("input").focus();
  });
  foot.append(edit);
  item.append(element("div", "bubble", message.content), foot);
  return item;
}

function cut(index) {
  running?.abort();
  messages.length = index;
  while ($("turns").children.length > index) $("turns").lastChild.remove();
  $("empty").hidden = index > 0;
  showFigures();
}

function add(message, item) {
  messages.push(message);
  $("turns").append(item);
  $("empty").hidden = true;
}

async function answer() {
  const made = new Answer();
  let problem = "";
  running = new AbortController();
  const mine = running;
  busy(true);
  const asked = load.read(); // the prices of this moment
  try {
    asked.catch(() => null);
    if (!server.model) await asked;
    const body = request();
    add(made.message, made.item);
    follow(true);
    for await (const chunk of await ask(body, mine.signal)) {
      made.take(chunk);
      follow();
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "Stopped." : error.message;
    if (!made.item.isConnected && error.name !== "AbortError") add(made.message, made.item);
  }
  made.ended = performance.now();
  await asked.catch(() => null);
  if (running === mine) running = null;
  busy(running !== null);
  account(made);
  if (!messages.includes(made.message)) return;
  made.end(problem);
  showFigures();
  for (const [n, call] of (made.message.tool_calls || []).entries()) offer(made, call, made.calls.children[n]);
  follow();
}

/** A field for the result of a tool call; when every call has one, the model goes on. */
function offer(made, call, box) {
  const form = element("form");
  const field = element("input");
  field.type = "text";
  field.setAttribute("aria-label", `Result of ${call.function.name}`);
  field.placeholder = "its result";
  form.append(field, element("button", "", "Give"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    form.remove();
    box.append(element("pre", "", field.value));
    const item = element("li");
    item.hidden = true;
    add({ role: "tool", tool_call_id: call.id, content: field.value }, item);
    const given = messages.filter((m) => made.message.tool_calls.some((c) => c.id === m.tool_call_id));
    if (given.length === made.message.tool_calls.length) answer();
  });
  box.append(form);
}

function again(index) {
  cut(index);
  answer();
}

// ---- figures

/** Adds an answer to what was spent. One that was stopped costs what had come, of which only the ledger knows. */
function account(made) {
  const { usage } = made;
  if (!usage) {
    made.bill.partly ||= made.first !== null;
    return;
  }
  const { prompt_cache_hit_tokens: hit = 0, prompt_cache_miss_tokens: miss = usage.prompt_tokens, completion_tokens: out } = usage;
  const price = server.price;
  if (price) made.cost = (hit * price.hit + miss * price.miss + out * price.output) / 1e6;
  made.bill.total += made.cost ?? 0;
  figures.set(made.message, made);
}

/** Of the last answer in view that was counted. */
function showFigures() {
  const { usage, cost, speed } = figures.get(messages.findLast((m) => figures.has(m))) ?? {};
  const used = usage?.total_tokens ?? 0, hit = usage?.prompt_cache_hit_tokens ?? 0, prompt = usage?.prompt_tokens ?? 0;
  $("context-meter").value = used / server.context;
  $("context-text").textContent = `${used.toLocaleString("en")} of ${server.context.toLocaleString("en")}`;
  $("hit-meter").value = prompt ? hit / prompt : 0;
  $("hit-text").textContent = prompt ? `${hit.toLocaleString("en")} of ${prompt.toLocaleString("en")}` : "–";
  $("speed").textContent = speed ? `${speed.toFixed(0)} tokens/s` : "–";
  $("turn-cost").textContent = cost === undefined ? "–" : dollars(cost);
  const { total, partly } = bill;
  $("total-cost").textContent = server.price && (total || partly) ? `${partly ? "over " : ""}${dollars(total)}` : "–";
}

// ---- controls

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
}

function follow(force = false) {
  const view = $("chat");
  if (force || view.scrollHeight - view.scrollTop - view.clientHeight < 120) view.scrollTop = view.scrollHeight;
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function send(event) {
  event?.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  for (const form of document.querySelectorAll(".call form")) form.remove(); // the model goes on without these results
  const message = { role: "user", content: text };
  add(message, userItem(message));
  $("input").value = "";
  grow();
  answer();
}

function show(view) {
  for (const name of ["chat", "load"]) {
    const chosen = name === view;
    $(name).hidden = !chosen;
    $(`tab-${name}`).setAttribute("aria-selected", chosen);
    $(`tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
  for (const only of ["footer", ".skip"]) document.querySelector(only).hidden = view !== "chat";
  load.watch(view === "load");
}

function theme(next) {
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
}

const load = new Load(headers, (status) => {
  server = { model: status.model, context: status.context, price: status.price };
  $("model").textContent = status.model;
  showFigures();
});

$("form").addEventListener("submit", send);
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => { bill = { total: 0, partly: false }; cut(0); $("input").focus(); });
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  if (event.key === "ArrowUp" && !$("input").value && !running) [...document.querySelectorAll(".user button")].at(-1)?.click();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
for (const name of ["chat", "load"]) {
  $(`tab-${name}`).addEventListener("click", () => show(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = name === "chat" ? "load" : "chat";
    show(other);
    $(`tab-${other}`).focus();
  });
}
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.body).colorScheme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const next = document.documentElement.dataset.theme === "dark" || dark ? "light" : "dark";
  theme(next);
  localStorage.setItem("theme", next);
});
theme(localStorage.getItem("theme"));
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); load.refresh(); });
$("system").value = localStorage.getItem("system") || "";
$("system").addEventListener("change", () => localStorage.setItem("system", $("system").value));
load.refresh();
$("input").focus();
