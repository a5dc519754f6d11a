// Heat maps that answer: the value of the cell under the pointer or the arrow keys, in every panel at once; zoom and pan.
// Cells count from the left and, for the view, from below; row 0 is at the top.
const rgb = (palette, i) => palette.slice(3 * i, 3 * i + 3);

// The part of a cell that lies in its panel; null where none does.
function cut(cell, box) {
  const [x, y] = [Math.max(cell.x, box.left), Math.max(cell.y, box.top)];
  const width = Math.min(cell.x + cell.width, box.left + box.width) - x;
  const height = Math.min(cell.y + cell.height, box.top + box.height) - y;
  return width > 0 && height > 0 ? { x, y, width, height } : null;
}

class HeatMap extends View {
  constructor(figure, spec, label) {
    super(spec);
    this.columns = spec.x.names.length;
    this.rows = spec.y.names.length;
    this.panels = spec.panels.map((p) => ({ ...p, values: numbers(p.values), error: p.error && numbers(p.error) }));
    if (!this.panels.length || !this.columns || !this.rows || !spec.scale) return;
    this.palette = Uint8Array.from(atob(spec.scale.palette), (c) => c.charCodeAt(0));
    for (const p of this.panels) p.image = this.image(p.values, this.columns, this.rows, this.place);
    this.build(figure, label, "heat map", () => {}, () => {});
    this.ramp = draw("svg", { "aria-hidden": "true" }, this.plot);
    html("p", { class: "unit-of" }, this.plot, spec.unit + spec.beyond);
    this.start(figure);
  }

  // 0 at the low end of the colours, 1 at the high one; NaN where a cell stays blank.
  place = (value) => {
    const { kind, low, high } = this.spec.scale;
    if (Number.isNaN(value) || (kind === "log" && value <= 0)) return NaN;
    const to = kind === "log" ? Math.log : (v) => v;
    return clamp((to(value) - to(low)) / (to(high) - to(low)), 0, 1);
  };

  index(place) { return Math.round(place * (this.palette.length / 3 - 1)); }

  image(values, width, height, place) {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    values.forEach((value, i) => {
      const at = place(value);
      if (!Number.isNaN(at)) pixels.data.set([...rgb(this.palette, this.index(at)), 255], 4 * i);
    });
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL();
  }

  get home() { return { x: [0, this.columns], y: [0, this.rows] }; }

  least(name) { return Math.min(3, name === "x" ? this.columns : this.rows); }

  // The first and the last column, or row from the top, of which some is in view.
  inView(name) {
    const [a, b] = name === "x" ? this.view.x : [this.rows - this.view.y[1], this.rows - this.view.y[0]];
    return [Math.floor(a + 1e-6), Math.ceil(b - 1e-6) - 1];
  }

  inWords() {
    const range = (axis) => `${this.spec[axis].label} ${this.inView(axis).map((i) => this.spec[axis].names[i]).join(" to ")}`;
    return `${range("x")}, ${range("y")}`;
  }

  paint(width) {
    const { spec } = this;
    const narrow = width < 520;
    const n = this.panels.length;
    const across = narrow ? (n < 4 ? 1 : 2) : { 1: 1, 2: 2, 4: 2 }[n] || 3;
    const widest = (names) => Math.max(...names.map((name) => Math.min(140, widthOf(name))));
    const left = widest(spec.y.names) + 10;
    const label = widest(spec.x.names);
    const slanted = label > 60 && label > (width - left) / across / this.columns - 6;
    const gap = slanted ? 16 : Math.max(16, label + 6);
    const w = Math.min((width - left - gap / 2 - gap * (across - 1)) / across, 440);
    const h = w * clamp(this.rows / this.columns, 0.3, 1);
    const room = (w - 18) / 1.1; // bold words are wider than the ruler's
    const heads = this.panels.map((panel) => wrapped(panel.name, room, 2));
    const head = 8 + 15 * Math.max(...heads.map((lines) => lines.length));
    this.svg.replaceChildren();
    this.boxes = this.panels.map((panel, k) => ({
      left: left + (k % across) * (w + gap), top: head + Math.floor(k / across) * (h + 14 + head), width: w, height: h,
    }));
    this.panels.forEach((panel, k) => this.panel(panel, heads[k], this.boxes[k], k % across === 0, k + across >= n, slanted));
    this.over = draw("g", { class: "over" }, this.svg);
    const bottom = this.boxes.at(-1).top + h + (slanted ? label * 0.58 + 14 : 20);
    this.sized(this.svg, width, bottom + 2);
    this.colours(width, left, Math.min(width - left - gap / 2, 440));
    if (this.at) this.read(...this.at);
  }

  sized(svg, width, height) {
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
  }

  panel(panel, lines, box, first, last, slanted) {
    const { spec, svg } = this;
    let x = box.left;
    if (panel.colour) {
      const mark = draw("path", { d: markerPath(panel.marker, x + 6, box.top + 4 - 15 * lines.length, 4.5), class: panel.hollow ? "hollow" : "filled" }, svg);
      mark.style.color = `var(--${panel.colour})`;
      x += 18;
    }
    lines.forEach((line, i) => draw("text", { x, y: box.top - 7 - 15 * (lines.length - 1 - i), class: "name" }, svg, line));
    draw("rect", { x: box.left, y: box.top, width: box.width, height: box.height, class: "noise" }, svg);
    const [[a, b], [c, d]] = [this.view.x, this.view.y];
    const part = { x: box.left, y: box.top, width: box.width, height: box.height, viewBox: `${a} ${this.rows - d} ${b - a} ${d - c}` };
    const inner = draw("svg", { ...part, preserveAspectRatio: "none" }, svg);
    draw("image", { href: panel.image, width: this.columns, height: this.rows, preserveAspectRatio: "none", class: "cells" }, inner);
    draw("rect", { x: box.left, y: box.top, width: box.width, height: box.height, class: "axis" }, svg);
    this.values(panel, box);
    const cell = this.cell(box, 0, 0);
    if (first)
      for (const i of this.ticks("y", box.height / 20)) {
        const { y, height } = this.cell(box, i, 0);
        draw("path", { d: `M${box.left},${y + height / 2}h-4`, class: "axis" }, svg);
        draw("text", { x: box.left - 7, y: y + height / 2 + 4, "text-anchor": "end" }, svg, shortened(spec.y.names[i], 140));
      }
    if (!last) return;
    const bottom = box.top + box.height;
    const room = slanted ? 18 : Math.max(...spec.x.names.map(widthOf)) + 8;
    for (const j of this.ticks("x", box.width / Math.max(room, 1), room <= cell.width)) {
      const middle = this.cell(box, 0, j).x + cell.width / 2;
      draw("path", { d: `M${middle},${bottom}v4`, class: "axis" }, svg);
      const at = slanted ? { transform: `translate(${middle + 3},${bottom + 13}) rotate(-35)`, "text-anchor": "end" }
        : { x: middle, y: bottom + 17, "text-anchor": "middle" };
      draw("text", at, svg, shortened(spec.x.names[j], 140));
    }
  }

  // Columns, or rows, to label: round numbers where names are evenly spaced numbers, else every k-th.
  ticks(name, most, all = false) {
    const [from, to] = this.inView(name);
    const { names } = this.spec[name];
    const every = all ? 1 : [1, 2, 5, 10, 20, 25, 50, 100, 200].find((k) => (to - from + 1) / k <= Math.max(2, most)) || 500;
    const values = names.map((v) => Number(v.replace("−", "-")));
    const step = values[1] - values[0];
    const even = step > 0 && values.every((v, i) => Math.abs(v - values[0] - i * step) < 1e-6 * step * values.length);
    const round = (i) => {
      const u = even ? values[i] / (every * step) : (i - from) / every;
      return Math.abs(u - Math.round(u)) < 1e-6;
    };
    const [low, high] = name === "x" ? this.view.x : [this.rows - this.view.y[1], this.rows - this.view.y[0]];
    const found = [];
    for (let i = from; i <= to; i++) if (round(i) && i + 0.5 >= low && i + 0.5 <= high) found.push(i);
    return found;
  }

  // Where cell (i, j) lies in a panel's box.
  cell(box, i, j) {
    const width = box.width / (this.view.x[1] - this.view.x[0]);
    const height = box.height / (this.view.y[1] - this.view.y[0]);
    const y = box.top + (i - (this.rows - this.view.y[1])) * height;
    return { x: box.left + (j - this.view.x[0]) * width, y, width, height };
  }

  // Numbers on the cells where every one in view fits.
  values(panel, box) {
    const { width, height } = this.cell(box, 0, 0);
    if (width < 26 || height < 17) return;
    const [[top, bottom], [left, right]] = [this.inView("y"), this.inView("x")];
    const found = [];
    for (let i = top; i <= bottom; i++)
      for (let j = left; j <= right; j++) {
        const value = panel.values[i * this.columns + j];
        const { x, y } = this.cell(box, i, j);
        const inside = x > box.left - 1 && y > box.top - 1 && x + width < box.left + box.width + 1 && y + height < box.top + box.height + 1;
        if (!Number.isNaN(this.place(value)) && inside) found.push([number(Number(value.toPrecision(3))), x, y, this.place(value)]);
      }
    if (found.some(([words]) => widthOf(words) > width - 5)) return;
    for (const [words, x, y, place] of found) {
      const [r, g, b] = rgb(this.palette, this.index(place));
      const ink = 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "on-light" : "on-dark";
      draw("text", { x: x + width / 2, y: y + height / 2 + 4, "text-anchor": "middle", class: ink }, this.svg, words);
    }
  }

  // The colour bar.
  colours(width, left, across) {
    const { kind, low, high } = this.spec.scale;
    const log = kind === "log";
    const most = across < 300 ? 4 : 6;
    const ticks = log ? logTicks(low, high, most) : linearTicks(low, high, most);
    const [words, factor] = log ? [logWords(ticks), ""] : linearWords(ticks);
    this.bar ||= this.image(Float64Array.from({ length: 255 }, (_, i) => i / 254), 255, 1, (v) => v);
    this.ramp.replaceChildren();
    draw("image", { href: this.bar, x: left, y: 10, width: across, height: 12, preserveAspectRatio: "none" }, this.ramp);
    draw("rect", { x: left, y: 10, width: across, height: 12, class: "axis" }, this.ramp);
    ticks.forEach((v, i) => {
      const x = left + this.place(v) * across;
      draw("path", { d: `M${x},22v4`, class: "axis" }, this.ramp);
      draw("text", { x, y: 39, "text-anchor": "middle" }, this.ramp, words[i] === "0" ? "0" : words[i] + factor);
    });
    this.sized(this.ramp, width, 42);
  }

  // ---- reading values

  boxAt([x, y]) {
    return (this.boxes || []).find((b) => x >= b.left && x <= b.left + b.width && y >= b.top && y <= b.top + b.height);
  }

  hover(at) {
    const box = this.boxAt(at);
    if (!box) return this.clear();
    const [fx, fy] = fraction(at, box);
    const within = ([a, b], f) => a + (b - a) * f;
    const j = clamp(Math.floor(within(this.view.x, fx)), 0, this.columns - 1);
    const i = clamp(Math.floor(this.rows - within(this.view.y, fy)), 0, this.rows - 1);
    this.read(this.boxes.indexOf(box), i, j);
  }

  read(k, i, j, aloud) {
    this.at = [k, i, j];
    this.over.replaceChildren();
    const lines = this.panels.map((panel, n) => {
      const spot = cut(this.cell(this.boxes[n], i, j), this.boxes[n]);
      for (const look of ["spot rim", "spot"]) if (spot) draw("rect", { ...spot, class: look }, this.over);
      const at = i * this.columns + j;
      const value = panel.values[at];
      return [null, panel.name || this.spec.unit, Number.isNaN(value) ? "blank" : number(value, panel.error ? panel.error[at] : null)];
    });
    const { x, y } = this.spec;
    const spot = this.cell(this.boxes[k], i, j);
    const head = `${y.label}: ${y.names[i]}, ${x.label}: ${x.names[j]} — ${this.spec.unit}`;
    const all = this.readout.show(head, lines, spot.x + spot.width / 2, spot.y + spot.height + 8);
    if (aloud) say(all);
  }

  clear() {
    this.at = null;
    if (this.over) this.over.replaceChildren();
    this.readout.hide();
  }

  reading() {
    if (!this.at) return null;
    const [k, i, j] = this.at;
    const { x, y, width, height } = this.cell(this.boxes[k], i, j);
    return fraction([x + width / 2, y + height / 2], this.boxes[k]);
  }

  steps() {
    const [k, i, j] = this.at || [0, this.inView("y")[0], this.inView("x")[0] - 1];
    const go = (n, row, column) => () => {
      const [r, c] = [clamp(row, 0, this.rows - 1), clamp(column, 0, this.columns - 1)];
      this.follow(r, c);
      this.read(clamp(n, 0, this.panels.length - 1), r, c, true);
    };
    return {
      ArrowLeft: go(k, i, j - 1),
      ArrowRight: go(k, i, j + 1),
      ArrowUp: go(k, i - 1, j),
      ArrowDown: go(k, this.at ? i + 1 : i, j),
      Home: go(k, i, 0),
      End: go(k, i, this.columns - 1),
      PageUp: go(k - 1, i, j),
      PageDown: go(k + 1, i, j),
    };
  }

  // Brings a cell that the keyboard reaches into view.
  follow(i, j) {
    const into = ([a, b], low) => { const by = Math.max(0, low + 1 - b) - Math.max(0, a - low); return [a + by, b + by]; };
    const before = JSON.stringify(this.view);
    this.view = { x: into(this.view.x, j), y: into(this.view.y, this.rows - 1 - i) };
    if (JSON.stringify(this.view) !== before) this.paint(this.plot.clientWidth);
  }
}
