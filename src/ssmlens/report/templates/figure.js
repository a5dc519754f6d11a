// A drawing of curves that answers: values under the pointer or the arrow keys, curves on and off, log and linear y.
const NEAR = 12; // px: as far from the pointed x a curve's own point may lie

class Chart extends Drawing {
  constructor(figure, spec, label) {
    super(spec);
    const legend = (bar) => {
      const group = html("div", { class: "legend", role: "group", "aria-label": "Curves shown" }, bar);
      spec.legend.forEach((entry, i) => {
        const made = html("button", { type: "button", "aria-pressed": "true" }, group);
        made.append(swatch(this.series[entry.of[0]], entry.common), entry.name);
        made.addEventListener("click", () => this.toggle(i, made));
      });
    };
    const switches = (tools) => {
      if (!spec.y.linear_view || !spec.y.log_view) return;
      const made = button(tools, "log y", "Logarithmic vertical axis", () => {
        this.logY = !this.logY;
        made.setAttribute("aria-pressed", String(this.logY));
        this.reset();
      });
      made.setAttribute("aria-pressed", String(this.logY));
    };
    this.build(figure, label, "chart", legend, switches);
    this.start(figure);
  }

  toggle(entry, made) {
    const on = this.off.entries.delete(entry);
    if (!on) this.off.entries.add(entry);
    made.setAttribute("aria-pressed", String(on));
    this.render();
  }

  showGroup(group, on) {
    if (on) this.off.groups.delete(group);
    else this.off.groups.add(group);
    this.render();
  }

  boxAt() { return this.box; }

  hover(at) { if (this.box) this.read(this.nearest(at[0])); }

  // Every x of the curves shown that is in view, in order.
  places() {
    if (this.known) return this.known;
    const [low, high] = this.view.x;
    const found = new Set();
    for (const s of this.shown)
      for (let i = 0; i < s.x.length; i++) {
        const u = this.toX(s.x[i]);
        if (u >= low && u <= high && (s.style !== "fit" || this.onlyFits) && this.place(s, i)) found.add(s.x[i]);
      }
    return (this.known = [...found].sort((a, b) => a - b));
  }

  render() {
    this.known = null;
    super.render();
  }

  get onlyFits() { return this.shown.every((s) => s.style === "fit"); }

  nearest(px) {
    let best, least = Infinity;
    for (const x of this.places()) {
      const off = Math.abs(this.sx(x) - px);
      if (off < least) [best, least] = [x, off];
    }
    return best;
  }

  // [index, x, y] of the curve at x: its nearest point or, on a fit, the line itself.
  atX(s, x) {
    const exact = s.x.indexOf(x);
    if (exact >= 0) return [exact, x, s.y[exact]];
    let best = -1, least = NEAR;
    for (let i = 0; i < s.x.length; i++) {
      if (s.style === "fit" && i && s.x[i - 1] <= x && x <= s.x[i]) {
        const f = (this.toX(x) - this.toX(s.x[i - 1])) / (this.toX(s.x[i]) - this.toX(s.x[i - 1]) || 1);
        const [a, b] = [this.toY(s.y[i - 1]), this.toY(s.y[i])];
        return [-1, x, this.fromY(a + (b - a) * f)];
      }
      const off = Math.abs(this.sx(s.x[i]) - this.sx(x));
      if (off < least) [best, least] = [i, off];
    }
    return best < 0 || s.style === "fit" ? null : [best, s.x[best], s.y[best]];
  }

  read(x, aloud) {
    if (x === undefined || !this.over) return this.clear();
    this.at = x;
    this.over.replaceChildren();
    const { box } = this;
    const px = this.sx(x);
    if (px < box.left - 1 || px > box.left + box.width + 1) return this.clear();
    draw("path", { d: `M${px},${box.top}V${box.top + box.height}`, class: "guide" }, this.over);
    const words = (v) => (this.spec.x.names ? this.spec.x.names[v] : number(v));
    const lines = [];
    let before = null; // the group of the line above: named once
    for (const s of this.shown) {
      const found = this.atX(s, x);
      if (!found) continue;
      const [i, at, y] = found;
      let value = number(y, i >= 0 && s.error ? s.error[i] : null);
      if (i >= 0 && s.low) value += ` [${number(s.low[i])}, ${number(s.high[i])}]`;
      if (at !== x) value += ` (at ${words(at)})`;
      lines.push([swatch(s), s.part && s.group === before ? s.part : s.name, value, s.name]);
      before = s.group;
      const py = Number.isFinite(y) && !(this.logY && y <= 0) ? this.sy(y) : NaN;
      if (py >= box.top - 1 && py <= box.top + box.height + 1) {
        const dot = draw("circle", { cx: this.sx(at + s.shift), cy: py, r: 4.5, class: "dot" }, this.over);
        dot.style.color = `var(--${s.colour})`;
      }
    }
    const head = this.spec.x.names ? words(x) : `${this.spec.x.label}: ${words(x)}`;
    const all = this.readout.show(head, lines, px, box.top + 4);
    if (aloud) say(all);
  }

  clear() {
    this.at = undefined;
    if (this.over) this.over.replaceChildren();
    this.readout.hide();
  }

  // Buttons and keys choose a range of x; y follows the curves in it.
  nearer(factor) {
    const [a, b] = this.view.x;
    const around = a + (b - a) * (this.reading() || [0.5])[0];
    const x = [around + (a - around) * factor, around + (b - around) * factor];
    const [left, right] = this.home.x;
    this.look(x, x[1] - x[0] >= right - left ? this.home.y : this.fitted(x), true);
  }

  fitted([a, b]) {
    const found = [];
    for (const s of this.shown)
      for (let i = 0; i < s.x.length; i++) {
        const u = this.toX(s.x[i]);
        if (u >= a && u <= b && this.place(s, i)) found.push(...[s.y[i], ...this.range(s, i)].map(this.toY).filter(Number.isFinite));
      }
    if (!found.length || this.shown.some((s) => s.style === "bar")) return this.view.y;
    const [low, high] = [found.reduce((p, q) => Math.min(p, q)), found.reduce((p, q) => Math.max(p, q))];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - room, high + room];
  }

  reading() {
    return this.at === undefined ? null : [fraction([this.sx(this.at), 0], this.box)[0], 0.5];
  }

  steps() {
    const all = this.places();
    const here = all.indexOf(this.at);
    const go = (i) => () => this.read(all[clamp(i, 0, all.length - 1)], true);
    return {
      ArrowLeft: go(here < 0 ? all.length - 1 : here - 1),
      ArrowRight: go(here + 1),
      PageUp: go(here - 10),
      PageDown: go(here + 10),
      Home: go(0),
      End: go(all.length - 1),
    };
  }
}
