// A part of the axes in view: zoom and pan by drag, wheel, fingers, buttons and keys. What is drawn in it, and what a
// place says, is the subclass's: home, least(axis), paint(width), boxAt(place), hover(place), clear(), steps(), inWords().

// A place in pixels as fractions of a box's width and height from below.
const fraction = ([x, y], box) => [clamp((x - box.left) / box.width, 0, 1), clamp(1 - (y - box.top) / box.height, 0, 1)];

class View {
  constructor(spec) {
    this.spec = spec;
    this.touches = new Map();
  }

  // legend and switches add what the subclass has beside the buttons of the view.
  build(figure, label, kind, legend, switches) {
    this.live = html("div", { class: "live" });
    const bar = html("div", { class: "bar" }, this.live);
    legend(bar);
    this.tools = html("div", { class: "tools", role: "toolbar", "aria-label": "View" }, bar);
    switches(this.tools);
    this.outer = button(this.tools, "−", "Zoom out", () => this.nearer(1.5));
    this.inner = button(this.tools, "+", "Zoom in", () => this.nearer(1 / 1.5));
    this.left = button(this.tools, "‹", "Move left", () => this.pan(-0.2, 0, true));
    this.right = button(this.tools, "›", "Move right", () => this.pan(0.2, 0, true));
    this.back = button(this.tools, "Reset", "Reset the view", () => this.reset(true));
    html("p", { class: "ylabel" }, this.live, this.spec.y.label);
    this.plot = html("div", {
      class: "plot", tabindex: "0", role: "application", "aria-roledescription": kind,
      "aria-label": `${label} Arrow keys read values, plus and minus zoom, Shift with arrow keys moves, 0 resets.`,
    }, this.live);
    this.svg = draw("svg", { "aria-hidden": "true" }, this.plot);
    html("p", { class: "xlabel" }, this.plot, this.spec.x.label);
  }

  start(figure) {
    this.readout = new Readout(this.plot);
    this.listen();
    figure.prepend(this.live);
    this.reset();
    this.paint(this.plot.clientWidth); // here, where a failure leaves the drawing in place
    new ResizeObserver(() => this.render()).observe(this.plot);
  }

  render() {
    const width = this.plot.clientWidth;
    if (!width || this.due) return;
    this.due = requestAnimationFrame(() => { this.due = null; this.paint(width); });
  }

  reset(aloud) {
    this.view = this.home;
    this.moved(aloud);
  }

  // New ranges, within the whole: no wider, not beside it, not deeper than the numbers are exact.
  look(x, y, aloud) {
    const whole = this.home;
    for (const [name, range] of [["x", x], ["y", y]]) {
      const [a, b] = whole[name];
      const span = clamp(range[1] - range[0], Math.min(this.least(name), b - a), b - a);
      const start = clamp((range[0] + range[1] - span) / 2, a, b - span);
      this.view[name] = [start, start + span];
    }
    this.moved(aloud);
  }

  // fx, fy: the point of the view that stays, as fractions of its width and height from below.
  zoom(factor, fx, fy, aloud) {
    const around = ([a, b], f) => { const c = a + (b - a) * f; return [c + (a - c) * factor, c + (b - c) * factor]; };
    this.look(around(this.view.x, fx), around(this.view.y, fy), aloud);
  }

  // Buttons and keys zoom around what is read, or the middle.
  nearer(factor) { this.zoom(factor, ...(this.reading() || [0.5, 0.5]), true); }

  pan(dx, dy, aloud) {
    const by = ([a, b], d) => [a + (b - a) * d, b + (b - a) * d];
    this.look(by(this.view.x, dx), by(this.view.y, dy), aloud);
  }

  moved(aloud) {
    const whole = this.home;
    const zoomed = ["x", "y"].some((n) => this.view[n][1] - this.view[n][0] < (whole[n][1] - whole[n][0]) * 0.9999);
    for (const made of [this.outer, this.left, this.right, this.back]) enable(made, zoomed);
    this.render();
    if (aloud) say(`${zoomed ? "Zoomed" : "Whole figure"}: ${this.inWords()}.`);
  }

  // ---- pointer and keys
  listen() {
    const { plot } = this;
    const where = (e) => { const r = plot.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; };
    plot.addEventListener("pointerdown", (e) => {
      const box = this.boxAt(where(e));
      if (e.button || !box) return;
      plot.setPointerCapture(e.pointerId);
      this.touches.set(e.pointerId, where(e));
      if (e.pointerType === "touch") this.hover(where(e));
      else this.drag = { from: where(e), last: where(e), pan: e.shiftKey, box };
    });
    plot.addEventListener("pointermove", (e) => {
      const at = where(e);
      if (this.touches.size === 2 && this.touches.has(e.pointerId)) return this.pinch(e.pointerId, at);
      if (this.drag) return this.dragged(at);
      this.hover(at);
    });
    const end = (e) => {
      this.touches.delete(e.pointerId);
      if (this.drag && e.type === "pointerup") this.drop(where(e));
      this.drag = null;
    };
    plot.addEventListener("pointerup", end);
    plot.addEventListener("pointercancel", (e) => { end(e); this.render(); });
    plot.addEventListener("pointerleave", (e) => { if (e.pointerType === "mouse" && !this.drag) this.clear(); });
    plot.addEventListener("dblclick", () => this.reset());
    plot.addEventListener("wheel", (e) => {
      const box = this.boxAt(where(e));
      if (!(e.ctrlKey || e.metaKey) || !box) return;
      e.preventDefault();
      this.zoom(1.0015 ** clamp(e.deltaY, -300, 300), ...fraction(where(e), box));
    }, { passive: false });
    plot.addEventListener("keydown", (e) => this.key(e));
    plot.addEventListener("blur", () => this.clear());
  }

  dragged(at) {
    const { drag } = this;
    if (drag.pan) {
      this.pan((drag.last[0] - at[0]) / drag.box.width, (at[1] - drag.last[1]) / drag.box.height);
      drag.last = at;
      return;
    }
    this.clear();
    const area = this.area(drag.from, at, drag.box);
    if (area) draw("rect", { ...area, class: "area" }, this.over);
  }

  // What a drag encloses; one that is nearly level, or nearly upright, means one axis alone.
  area(a, b, box) {
    const [x0, x1] = [a[0], b[0]].map((x) => clamp(x, box.left, box.left + box.width)).sort((p, q) => p - q);
    const [y0, y1] = [a[1], b[1]].map((y) => clamp(y, box.top, box.top + box.height)).sort((p, q) => p - q);
    const [wide, high] = [x1 - x0 >= 12, y1 - y0 >= 12];
    if (!wide && !high) return null;
    return { x: wide ? x0 : box.left, width: wide ? x1 - x0 : box.width, y: high ? y0 : box.top, height: high ? y1 - y0 : box.height };
  }

  drop(at) {
    const { from, pan, box } = this.drag;
    const area = pan ? null : this.area(from, at, box);
    if (!area) return;
    const [a, d] = fraction([area.x, area.y], box);
    const [b, c] = fraction([area.x + area.width, area.y + area.height], box);
    const part = ([low, high], p, q) => [low + (high - low) * p, low + (high - low) * q];
    this.look(part(this.view.x, a, b), part(this.view.y, c, d));
  }

  pinch(id, at) {
    const [other] = [...this.touches].filter(([k]) => k !== id).map(([, v]) => v);
    const before = this.touches.get(id);
    this.touches.set(id, at);
    const apart = (p) => Math.max(20, Math.hypot(p[0] - other[0], p[1] - other[1]));
    const [cx, cy] = [(at[0] + other[0]) / 2, (at[1] + other[1]) / 2];
    const box = this.boxAt([cx, cy]) || this.boxAt(other);
    this.clear();
    if (!box) return;
    this.pan((before[0] - at[0]) / 2 / box.width, (at[1] - before[1]) / 2 / box.height);
    this.zoom(apart(before) / apart(at), ...fraction([cx, cy], box));
  }

  key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const moves = {
      "+": () => this.nearer(1 / 1.5),
      "=": () => this.nearer(1 / 1.5),
      "-": () => this.nearer(1.5),
      0: () => this.reset(true),
      Escape: () => this.clear(),
    };
    const far = {
      ArrowLeft: () => this.pan(-0.2, 0, true),
      ArrowRight: () => this.pan(0.2, 0, true),
      ArrowUp: () => this.pan(0, 0.2, true),
      ArrowDown: () => this.pan(0, -0.2, true),
    };
    const act = (e.shiftKey && far[e.key]) || moves[e.key] || this.steps()[e.key];
    if (!act) return;
    e.preventDefault();
    act();
  }
}
