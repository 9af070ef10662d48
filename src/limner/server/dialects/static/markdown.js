// Markdown as elements: headings, paragraphs, lists, tables, code, emphasis and links. What is HTML in it stays text.

import { h } from "./dom.js";

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*]+)\*|\[([^\]]+)\]\(([^)\s]+)\)|\\([[\]*_`\\])/g;

function inline(text) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    const [all, code, strong, em, label, target, escaped] = match;
    found.push(text.slice(at, match.index));
    at = match.index + all.length;
    if (code) found.push(h("code", { textContent: code }));
    else if (strong) found.push(h("strong", {}, ...inline(strong)));
    else if (em) found.push(h("em", {}, ...inline(em)));
    else if (escaped) found.push(escaped);
    else if (/^https?:/.test(target)) found.push(h("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, ...inline(label)));
    else found.push(...inline(label)); // a file beside the card, which is not here
  }
  return [...found, text.slice(at)].filter(Boolean);
}

const cells = (line) => line.replace(/^\s*\||\|\s*$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  return h("div", { className: "wide-table", tabIndex: 0, role: "group", "aria-label": "Table" }, h("table", {},
    h("thead", {}, h("tr", {}, ...head.map((cell) => h("th", { scope: "col" }, ...inline(cell))))),
    h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map((cell) => h("td", {}, ...inline(cell))))))));
}

/** Elements of a text; its headings begin at level `top`. */
export function markdown(text, { top = 3 } = {}) {
  const blocks = text.replace(/\r/g, "").replace(/^---\n.*?\n---\n/s, "").replace(/<!--.*?-->/gs, "").split(/(^```[^\n]*\n.*?^```$)/ms);
  const found = [];
  for (const block of blocks) {
    const fenced = /^```[^\n]*\n(.*?)^```$/ms.exec(block);
    if (fenced) {
      found.push(h("pre", { tabIndex: 0 }, h("code", { textContent: fenced[1] })));
      continue;
    }
    for (const part of block.split(/\n\s*\n|\n(?=#)|(?<=^#[^\n]*)\n/m)) {
      const lines = part.split("\n").filter((line) => line.trim());
      if (!lines.length) continue;
      const heading = /^(#+)\s+(.*)/.exec(lines[0]);
      if (heading) found.push(h(`h${Math.min(6, heading[1].length - 1 + top)}`, {}, ...inline(heading[2])));
      else if (/^\s*\|/.test(lines[0]) && /^[\s|:-]+$/.test(lines[1] ?? "")) found.push(table(lines));
      else if (/^\s*([-*]|\d+\.)\s/.test(lines[0])) {
        const items = [];
        for (const line of lines) {
          const item = /^\s*(?:[-*]|\d+\.)\s+(.*)/.exec(line);
          if (item) items.push(item[1]); else items[items.length - 1] += ` ${line.trim()}`;
        }
        found.push(h(/^\s*\d/.test(lines[0]) ? "ol" : "ul", {}, ...items.map((item) => h("li", {}, ...inline(item)))));
      } else found.push(h("p", {}, ...inline(lines.map((line) => line.trim()).join(" "))));
    }
  }
  return found;
}
