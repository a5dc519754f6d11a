// Curves drawn as SVG on the numbers of report/live.py, for whatever part of the axes is in view.
const rank = (s) => ["bar", "fit", "step", "line", "points"].indexOf(s.style);
const tenth = (v) => Math.round(v * 10) / 10;
const clip = (v) => clamp(v, -1e6, 1e6); // far outside the view, and still a number that browsers draw

class Drawing extends View {
  constructor(spec) {
    super(spec);
    const arrays = spec.arrays.map(numbers);
    this.series = spec.series.map((s) => {
      const made = { ...s };
      for (const name of ["x", "y", "error", "low", "high"]) made[name] = s[name] === null ? null : arrays[s[name]];
      return made;
    });
    this.off = { groups: new Set(), entries: new Set() };
    this.logY = spec.y.log;
  }

  get shown() {
    const hidden = new Set([...this.off.entries].flatMap((i) => this.spec.legend[i].of));
    return this.series.filter((s, j) => !hidden.has(j) && !this.off.groups.has(s.group));
  }

  // The whole, in log10 where an axis is logarithmic.
  get home() {
    const y = this.logY ? this.spec.y.log_view : this.spec.y.linear_view;
    return { x: this.spec.x.view.map(this.toX), y: y.map(this.toY) };
  }

  // How little of an axis a view may show: more would be deeper than the numbers are exact.
  least(name) {
    const [a, b] = this.home[name];
    return name === "x" && this.spec.x.names ? 1.5 : (b - a) * 1e-3;
  }

  inWords() {
    const range = (axis, from) => `${this.spec[axis].label} ${this.view[axis].map((v) => number(from(v))).join(" to ")}`;
    return [...(this.spec.x.names ? [] : [range("x", this.fromX)]), range("y", this.fromY)].join(", ");
  }

  toX = (v) => (this.spec.x.log ? Math.log10(v) : v);
  toY = (v) => (this.logY ? Math.log10(v) : v);
  fromX = (v) => (this.spec.x.log ? 10 ** v : v);
  fromY = (v) => (this.logY ? 10 ** v : v);

  // ---- drawing

  paint(width) {
    const { spec } = this;
    const narrow = width < 520;
    const inner = narrow ? 240 : 330;
    const [lowX, highX] = this.view.x.map(this.fromX);
    const [lowY, highY] = this.view.y.map(this.fromY);
    const ticksY = this.logY ? logTicks(lowY, highY, 8) : linearTicks(lowY, highY, 6);
    const [wordsY, factorY] = this.logY ? [logWords(ticksY), ""] : linearWords(ticksY);
    const left = this.leftOf(width, Math.max(28, ...wordsY.map(widthOf)) + 10);
    const box = { left, top: factorY ? 22 : 8, width: width - left - 14, height: inner };
    this.box = box;
    this.sx = (v) => box.left + ((this.toX(v) - this.view.x[0]) / (this.view.x[1] - this.view.x[0])) * box.width;
    this.sy = (v) => box.top + box.height - ((this.toY(v) - this.view.y[0]) / (this.view.y[1] - this.view.y[0])) * box.height;
    this.svg.replaceChildren();
    const bottom = box.top + box.height;
    const mask = `mask${(Drawing.count = (Drawing.count || 0) + 1)}`;
    const defs = draw("clipPath", { id: mask }, draw("defs", {}, this.svg));
    draw("rect", { x: box.left, y: box.top - 4, width: box.width, height: box.height + 8 }, defs);
    if (spec.floor !== null && this.spec.y.log === this.logY) this.noise(box, bottom);
    ticksY.forEach((v, i) => {
      draw("path", { d: `M${box.left},${this.sy(v)}H${box.left + box.width}`, class: "grid" }, this.svg);
      draw("text", { x: box.left - 7, y: this.sy(v) + 4, "text-anchor": "end" }, this.svg, wordsY[i]);
    });
    if (factorY) draw("text", { x: box.left, y: 12 }, this.svg, factorY);
    const below = spec.x.names ? this.named(box, bottom) : this.numbered(lowX, highX, narrow ? 4 : 8, box, bottom);
    draw("path", { d: `M${box.left},${box.top}V${bottom}H${box.left + box.width}`, class: "axis" }, this.svg);
    if (this.shown.some((s) => s.style === "bar") && !this.logY && lowY < 0 && highY > 0)
      draw("path", { d: `M${box.left},${this.sy(0)}H${box.left + box.width}`, class: "axis" }, this.svg);
    const curves = draw("g", { "clip-path": `url(#${mask})` }, this.svg);
    const { shown } = this;
    for (const s of shown) if (!s.barred) this.band(s, curves, bottom);
    for (const s of [...shown].sort((a, b) => rank(a) - rank(b))) this.curve(s, curves, bottom);
    if (!shown.length) draw("text", { x: box.left + box.width / 2, y: box.top + 40, "text-anchor": "middle" }, this.svg, "every curve is switched off");
    this.over = draw("g", { class: "over" }, this.svg);
    const height = bottom + below + 4;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.style.height = `${height}px`;
    if (this.at !== undefined) this.read(this.at);
  }

  // Room at the left for slanted names, which reach beyond the axis.
  leftOf(width, least) {
    if (!this.spec.x.names) return least;
    const slot = (width - least - 14) / (this.view.x[1] - this.view.x[0]);
    const names = this.inView().map(([name]) => name);
    if (fitsLevel(names, slot)) return least;
    return Math.max(least, Math.min(0.25 * width, Math.max(...names.map(widthOf)) * 0.82 - 0.5 * slot + 8));
  }

  inView() {
    return this.spec.x.names.map((name, i) => [name, i]).filter(([, i]) => i >= this.view.x[0] && i <= this.view.x[1]);
  }

  noise(box, bottom) {
    const y = clamp(this.sy(this.spec.floor), box.top, bottom);
    draw("rect", { x: box.left, y, width: box.width, height: bottom - y, class: "noise" }, this.svg);
    if (y <= box.top || y >= bottom) return;
    draw("path", { d: `M${box.left},${y}H${box.left + box.width}`, class: "floor" }, this.svg);
    draw("text", { x: box.left + 6, y: bottom - y > 20 ? y + 14 : y - 5 }, this.svg, "floating-point noise below");
  }

  numbered(low, high, most, box, bottom) {
    const { log } = this.spec.x;
    const ticks = log ? logTicks(low, high, most) : linearTicks(low, high, most);
    const [words, factor] = log ? [logWords(ticks), ""] : linearWords(ticks);
    ticks.forEach((v, i) => {
      draw("path", { d: `M${this.sx(v)},${bottom}v5`, class: "axis" }, this.svg);
      draw("text", { x: this.sx(v), y: bottom + 18, "text-anchor": "middle" }, this.svg, words[i]);
    });
    if (factor) draw("text", { x: box.left + box.width, y: bottom + 34, "text-anchor": "end" }, this.svg, factor);
    return factor ? 36 : 20;
  }

  // Level where the words fit, in lines; else slanted and shortened; of many, every k-th.
  named(box, bottom) {
    const slot = box.width / (this.view.x[1] - this.view.x[0]);
    const inView = this.inView();
    let lines = 1;
    if (fitsLevel(inView.map(([name]) => name), slot)) {
      for (const [name, i] of inView) {
        const words = wrapped(name, slot - 6, 9);
        const text = draw("text", { "text-anchor": "middle" }, this.svg);
        words.forEach((line, n) => draw("tspan", { x: this.sx(i), y: bottom + 18 + 15 * n }, text, line));
        lines = Math.max(lines, words.length);
      }
      return 6 + 15 * lines;
    }
    const every = Math.max(1, Math.ceil(17 / slot));
    let longest = 0;
    inView.filter(([, i]) => i % every === 0).forEach(([name, i]) => {
      const room = Math.min(180, (this.sx(i) - 8) / 0.82);
      const shorter = shortened(name, room);
      longest = Math.max(longest, widthOf(shorter));
      const place = `translate(${this.sx(i) + 3},${bottom + 14}) rotate(-35)`;
      draw("text", { transform: place, "text-anchor": "end" }, this.svg, shorter);
    });
    return 20 + longest * 0.58;
  }

  place(s, i) {
    const y = s.y[i];
    if (!Number.isFinite(y) || (this.logY && y <= 0) || (this.spec.x.log && s.x[i] <= 0)) return null;
    return [this.sx(s.x[i] + s.shift), this.sy(y)];
  }

  range(s, i) {
    if (s.low) return [s.low[i], s.high[i]];
    return s.error ? [s.y[i] - s.error[i], s.y[i] + s.error[i]] : [NaN, NaN];
  }

  band(s, parent, bottom) {
    if (!s.low && !s.error) return;
    let upper = [], lower = [];
    const group = draw("g", { class: "band" }, parent);
    group.style.color = `var(--${s.colour})`;
    const close = () => {
      if (upper.length > 1) draw("path", { d: `M${upper.join("L")}L${lower.reverse().join("L")}Z` }, group);
      [upper, lower] = [[], []];
    };
    for (let i = 0; i < s.x.length; i++) {
      const at = this.place(s, i);
      const [low, high] = this.range(s, i);
      if (!at || !Number.isFinite(high) || (this.logY && high <= 0)) { close(); continue; }
      const y1 = clip(this.sy(high)), y0 = this.logY && !(low > 0) ? bottom + 9 : clip(this.sy(low));
      if (s.style === "step" && upper.length) {
        upper.push([at[0], upper.at(-1)[1]].map(tenth));
        lower.push([at[0], lower.at(-1)[1]].map(tenth));
      }
      upper.push([at[0], y1].map(tenth));
      lower.push([at[0], y0].map(tenth));
    }
    close();
  }

  curve(s, parent, bottom) {
    const group = draw("g", { class: "curve" }, parent);
    group.style.color = `var(--${s.colour})`;
    const all = Array.from(s.x, (_, i) => this.place(s, i));
    if (s.style === "bar") {
      const zero = clip(this.logY ? bottom : this.sy(0));
      all.forEach((at, i) => {
        if (!at) return;
        const half = ((this.sx(s.x[i] + s.shift + s.width / 2) - at[0]) || 1) * 0.94;
        const y = clip(at[1]);
        draw("rect", { x: at[0] - half, y: Math.min(y, zero), width: 2 * half, height: Math.abs(y - zero), opacity: s.hollow ? 0.45 : 0.9, class: "filled" }, group);
      });
    } else if (s.style !== "points") {
      let d = "", pen = false;
      all.forEach((at, i) => {
        if (!at) { pen = false; return; }
        const [x, y] = [at[0], clip(at[1])].map(tenth);
        if (!pen && !s.marked && !all[i + 1]) d += `M${x - 1},${y}h2`; // a point between gaps
        else d += !pen ? `M${x},${y}` : s.style === "step" ? `H${x}V${y}` : `L${x},${y}`;
        pen = true;
      });
      draw("path", { d, ...strokeOf(s) }, group);
    }
    if (s.barred && (s.low || s.error)) this.whiskers(s, all, group, bottom);
    if (s.marked)
      for (const at of all)
        if (at) draw("path", { d: markerPath(s.marker, at[0], clip(at[1]), s.x.length > 32 ? 2.4 : 3.8), class: s.hollow ? "hollow" : "filled" }, group);
  }

  whiskers(s, all, group, bottom) {
    let d = "";
    all.forEach((at, i) => {
      const [low, high] = this.range(s, i);
      if (!at || !Number.isFinite(low) || !Number.isFinite(high)) return;
      const x = tenth(at[0]);
      const y1 = tenth(clip(this.sy(high))), y0 = tenth(this.logY && !(low > 0) ? bottom : clip(this.sy(low)));
      d += `M${x},${y0}V${y1}M${x - 3},${y1}h6M${x - 3},${y0}h6`;
    });
    if (s.style === "bar") draw("path", { d, class: "rim" }, group);
    draw("path", { d, class: s.style === "bar" ? "whisker dark" : "whisker" }, group);
  }
}
