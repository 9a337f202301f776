// A little Markdown as DOM nodes: fenced code, inline code, bold. Everything else stays as it was written.

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*)/;

function inline(text) {
  return text.split(INLINE).filter(Boolean).map((piece) => {
    const mark = piece.startsWith("`") ? "code" : piece.startsWith("**") && piece.length > 4 ? "strong" : "";
    if (!mark || !INLINE.test(piece)) return document.createTextNode(piece);
    const node = document.createElement(mark);
    node.textContent = mark === "code" ? piece.slice(1, -1) : piece.slice(2, -2);
    return node;
  });
}

function code(lines) {
  const block = document.createElement("pre");
  block.tabIndex = 0; // a keyboard must be able to scroll it
  block.appendChild(document.createElement("code")).textContent = lines.join("\n");
  return block;
}

/** The nodes of a text; a fence that is still open counts as code up to the end. */
export function render(text) {
  const nodes = [];
  let held = [], fenced = false;
  const flush = () => {
    const joined = held.join("\n").replace(/^\n+|\n+$/g, "");
    if (fenced) nodes.push(code(held));
    else for (const part of joined.split(/\n{2,}/).filter(Boolean)) {
      const paragraph = document.createElement("p");
      paragraph.append(...inline(part));
      nodes.push(paragraph);
    }
    held = [];
  };
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line)) { flush(); fenced = !fenced; } else held.push(line);
  }
  flush();
  return nodes;
}
