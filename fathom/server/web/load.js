// The second view: what the server is doing, what its cache holds, who has used what.

const EVERY = 2000, KEPT = 150; // milliseconds; points of five minutes
const $ = (id) => document.getElementById(id);
const bytes = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(0)} kB`);
const count = (n) => n.toLocaleString("en");

function made(name, text, attributes = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

export class Load {
  /** headers: for a request; known: is told the status whenever it is read. */
  constructor(headers, known) {
    Object.assign(this, { headers, known, points: [], timer: null });
  }

  watch(yes) {
    clearInterval(this.timer);
    this.timer = yes ? setInterval(() => this.refresh(), EVERY) : null;
    if (yes) this.refresh();
  }

  async read() {
    const response = await fetch("status", { headers: this.headers(), signal: AbortSignal.timeout(10_000) });
    const status = await response.json();
    if (!response.ok) throw new Error(status.error?.message || `status ${response.status}`);
    this.known(status);
    return status;
  }

  async refresh() {
    try {
      const status = await this.read();
      this.show(status);
      $("load-note").textContent = status.notes.join(" · ");
    } catch (error) {
      $("load-note").textContent = `The server does not say how it is: ${error.message}`;
    }
  }

  show(status) {
    this.points.push([status.running, status.waiting]);
    this.points = this.points.slice(-KEPT);
    this.figures(status);
    this.chart();
    const tiers = Object.entries(status.tiers).map(([name, [used, most]]) => this.tier(name, used, most, status.restored[name] || 0));
    $("tiers").replaceChildren(...(tiers.length ? tiers : [made("p", "This engine keeps nothing.", { class: "quiet" })]));
    $("no-ledger").hidden = status.ledger.length > 0;
    $("ledger").tBodies[0].replaceChildren(...status.ledger.map((row) => this.row(row)));
  }

  figures({ running, waiting, requests, hit_rate, tokens_per_second }) {
    const rate = hit_rate === null ? "–" : `${(100 * hit_rate).toFixed(1)} %`;
    const shown = { running, waiting, "requests so far": count(requests), "from cache": rate, "output tokens/s": tokens_per_second.toFixed(1) };
    $("now").replaceChildren(...Object.entries(shown).map(([name, value]) => {
      const box = document.createElement("div");
      box.append(made("dt", name), made("dd", value));
      return box;
    }));
  }

  chart() {
    const highest = Math.max(...this.points.map(([a, b]) => a + b)), most = Math.max(4, highest);
    $("most").textContent = count(highest);
    const line = (of, colour) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      path.setAttribute("points", this.points.map((p, i) => `${(KEPT - this.points.length + i) * 4},${78 - (of(p) / most) * 72}`).join(" "));
      path.setAttribute("style", `fill:none;stroke:${colour};stroke-width:2;vector-effect:non-scaling-stroke`);
      return path;
    };
    $("history").setAttribute("viewBox", `0 0 ${KEPT * 4} 80`);
    $("history").setAttribute("preserveAspectRatio", "none");
    $("history").replaceChildren(line(([a, b]) => a + b, "var(--quiet)"), line(([a]) => a, "var(--accent)"));
  }

  tier(name, used, most, restored) {
    const box = made("div", "", { class: "tier" });
    box.append(made("span", name), made("meter", "", { min: 0, max: most || 1, value: used, "aria-label": `${name} tier` }), made("span", `${bytes(used)} of ${bytes(most)}`), made("span", `${count(restored)} tokens`));
    return box;
  }

  row({ key, requests, hit, miss, output, amount }) {
    const line = document.createElement("tr");
    line.append(...[key ?? "(no key)", count(requests), count(hit), count(miss), count(output), amount].map((text) => made("td", text)));
    return line;
  }
}
