"use strict";
// Read-outs of charts and bars, and sortable tables. No library, no network.

const tip = document.getElementById("tip");

function showTip(x, y, fill) {
  tip.replaceChildren();
  fill(tip);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(4, y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
}

function tipLine(text, style) {
  const line = document.createElement("div");
  if (style) {
    const key = document.createElement("i");
    key.className = style;
    line.append(key);
  }
  line.append(text);
  return line;
}

document.addEventListener("pointermove", (event) => {
  const target = event.target.closest("[data-tip]");
  if (target) showTip(event.clientX, event.clientY, (box) => box.append(target.dataset.tip));
  else if (!event.target.closest("[data-chart]")) tip.hidden = true;
});

function figureText(value, unit) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  const text = size && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(5));
  return unit ? text + " " + unit : text;
}

function svgNode(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// ---- charts: a vertical line under the pointer, and every series' value there
const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = svgNode("line", { class: "cursor", y1: data.top, y2: data.bottom, visibility: "hidden" });
  const marks = data.series.map((series) => svgNode("circle", { class: "mark " + series.style, r: 4, visibility: "hidden" }));
  svg.append(cursor, ...marks);
  let at = 0;

  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let best = 0;
    data.x.forEach((position, index) => {
      if (Math.abs(position - x) < Math.abs(data.x[best] - x)) best = index;
    });
    return best;
  }
  function read(index, clientX, clientY) {
    at = index;
    for (const [name, value] of [["x1", data.x[index]], ["x2", data.x[index]], ["visibility", "visible"]]) cursor.setAttribute(name, value);
    data.series.forEach((series, number) => {
      const y = series.y[index];
      const seen = y !== undefined && y !== null;
      marks[number].setAttribute("visibility", seen ? "visible" : "hidden");
      if (!seen) return;
      marks[number].setAttribute("cx", data.x[index]);
      marks[number].setAttribute("cy", y);
    });
    showTip(clientX, clientY, (box) => {
      box.append(tipLine(data.labels[index]));
      for (const series of data.series) box.append(tipLine(series.name + "  " + figureText(series.values[index], data.unit), series.style));
    });
  }
  function leave() {
    tip.hidden = true;
    for (const node of [cursor, ...marks]) node.setAttribute("visibility", "hidden");
  }
  svg.addEventListener("pointermove", (event) => read(nearest(event), event.clientX, event.clientY));
  svg.addEventListener("pointerleave", leave);
  figure.addEventListener("blur", leave);
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect();
    const index = Math.max(0, Math.min(data.x.length - 1, at + step));
    read(index, box.left + (data.x[index] / svg.viewBox.baseVal.width) * box.width, box.top);
  });
  return { data, svg, nearest };
});

// ---- sortable tables
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        const [p, q] = [x, y].map((text) => (text === "" ? NaN : Number(text.replaceAll(",", "").replace("×", ""))));
        if (Number.isNaN(p) !== Number.isNaN(q)) return Number.isNaN(p) ? 1 : -1; // what has no figure stays below
        const sign = Number.isNaN(p) ? x.localeCompare(y) : p - q;
        return up ? sign : -sign;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}

// ---- a chart as a file or as text: its drawing with the page's colours written into it, its figures as CSV
const DRAWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin", "paint-order", "font-size", "font-family"];

function drawing(svg) {
  const copy = svg.cloneNode(true);
  const [from, to] = [svg, copy].map((root) => [...root.querySelectorAll("*")]);
  to.forEach((node, index) => {
    const style = getComputedStyle(from[index]);
    for (const name of DRAWN) node.style.setProperty(name, style.getPropertyValue(name));
  });
  copy.querySelectorAll(".cursor, .playhead, .mark").forEach((node) => node.remove());
  const { width, height } = svg.viewBox.baseVal;
  for (const [name, value] of [["xmlns", "http://www.w3.org/2000/svg"], ["width", width], ["height", height]]) copy.setAttribute(name, value);
  copy.style.background = getComputedStyle(document.body).getPropertyValue("--card");
  return new XMLSerializer().serializeToString(copy);
}

function table(data) {
  // What a spreadsheet would run as a formula becomes text.
  const plain = (text) => (/^\s*[=+\-@\t\r\n＝＋－＠]/.test(text) ? `'${text}` : text);
  const cell = (value) => (typeof value === "string" ? `"${plain(value).replaceAll('"', '""')}"` : value ?? "");
  const rows = [["", ...data.series.map((series) => series.name)], ...data.labels.map((label, index) => [label, ...data.series.map((series) => series.values[index])])];
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name.replace(/[^\w-]+/g, "_") + (type === "text/csv" ? ".csv" : ".svg");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const scatters = [...document.querySelectorAll("[data-points]")].map((figure) => ({ data: JSON.parse(figure.dataset.points), svg: figure.querySelector("svg") }));
for (const chart of [...charts, ...scatters]) {
  const caption = chart.svg.closest("figure").querySelector("figcaption");
  const name = caption.querySelector("span").textContent;
  const button = (text, title, act) => {
    const made = Object.assign(document.createElement("button"), { type: "button", className: "export", textContent: text, title });
    made.addEventListener("click", () => act(made));
    caption.append(made);
  };
  button("SVG", "save the drawing", () => save(name, "image/svg+xml", drawing(chart.svg)));
  button("CSV", "save its figures", () => save(name, "text/csv", table(chart.data)));
  button("copy", "copy its figures as CSV", (made) => {
    navigator.clipboard.writeText(table(chart.data)).then(() => { made.textContent = "copied"; }, () => { made.textContent = "not allowed"; });
  });
}
