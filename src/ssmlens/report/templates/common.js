// What the page's scripts share: numbers in words (as report/text.py writes them), arrays, elements, the readout.
const power = (exponent) =>
  "10" + String(exponent).replace(/[-0-9]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[+c]));

function parts(value) {
  const [mantissa, exponent] = value.toExponential().split("e");
  return [mantissa, Number(exponent)];
}

function minus(shown) {
  return /^-[0.]*$/.test(shown) ? shown.slice(1) : shown.replaceAll("-", "−");
}

// As in Python, a value halfway between two goes to the even one.
function fixed(value, places) {
  const shown = value.toFixed(places);
  const longer = value.toFixed(places + 1);
  const tie = longer.endsWith("5") && Number(longer) === value && /[13579]$/.test(shown);
  return minus(tie ? longer.slice(0, -1).replace(/\.$/, "") : shown);
}

function significant(value) {
  if (value === 0) return "0";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return minus(String(value));
  const [mantissa, exponent] = value.toExponential(3).split("e");
  const short = (s) => minus(s.includes(".") ? s.replace(/0+$/, "").replace(/\.$/, "") : s);
  if (exponent > -4 && exponent < 6) return short(value.toFixed(Math.max(0, 3 - exponent)));
  return `${short(mantissa)}×${power(Number(exponent))}`;
}

// Four significant digits or, with a standard error, both to the error's second digit: (3.10 ± 0.20)×10⁻⁷.
function number(value, error = null) {
  const odd = (v) => (Number.isNaN(v) ? "undefined" : v > 0 ? "∞" : "−∞");
  if (!Number.isFinite(value)) return odd(value);
  if (error === null) return significant(value);
  if (!Number.isFinite(error)) return `${significant(value)} ± ${odd(error)}`;
  if (error === 0) return `${significant(value)} ± 0`;
  if (Math.abs(error) < 1e-9 * Math.abs(value)) return `${significant(value)} ± ${significant(error)}`;
  const places = (e) => Math.min(12, Math.max(0, 1 - Number(Math.abs(e).toExponential(1).split("e")[1])));
  const exponent = parts(Math.max(Math.abs(value), Math.abs(error)))[1];
  if (exponent > -4 && exponent < 6) return `${fixed(value, places(error))} ± ${fixed(error, places(error))}`;
  const shifted = (v) => { const [m, e] = parts(v); return Number(`${m}e${e - exponent}`); };
  const [v, e] = [shifted(value), shifted(error)];
  return `(${fixed(v, places(e))} ± ${fixed(e, places(e))})×${power(exponent)}`;
}

// "d": float64; "t": the upper three bytes of float32 (report/live.py).
function numbers(packed) {
  const bytes = Uint8Array.from(atob(packed.slice(1)), (c) => c.charCodeAt(0));
  if (packed[0] === "d") return new Float64Array(bytes.buffer);
  const wide = new Uint8Array((bytes.length / 3) * 4);
  bytes.forEach((b, i) => { wide[Math.floor(i / 3) * 4 + (i % 3) + 1] = b; });
  return new Float32Array(wide.buffer);
}

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

function html(tag, attributes, parent, words) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  if (words !== undefined) made.textContent = words;
  if (parent) parent.append(made);
  return made;
}

function draw(tag, attributes, parent, words) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  if (words !== undefined) made.textContent = words;
  if (parent) parent.append(made);
  return made;
}

function button(parent, words, label, act) {
  const made = html("button", { type: "button", "aria-label": label, title: label }, parent, words);
  made.addEventListener("click", () => { if (made.getAttribute("aria-disabled") !== "true") act(); });
  return made;
}

const enable = (made, on) => made.setAttribute("aria-disabled", String(!on));

// One live region for the whole page: what the keyboard reads or changes is said there, what the mouse passes over is not.
let region = null;
function say(words) {
  region ||= html("div", { role: "status", "aria-live": "polite", class: "unseen" }, document.body);
  region.textContent = words;
}

// The box with the values: beside the place it speaks of or, on a phone, below the picture.
class Readout {
  constructor(box) {
    this.box = box;
    this.element = html("div", { class: "readout", hidden: "", "aria-hidden": "true" }, box);
  }
  // lines: [swatch element or null, name, value, name where it stands alone]; x: where, of the box's width.
  // Returns all of it as sentences.
  show(head, lines, x, top) {
    const width = this.box.clientWidth;
    this.element.replaceChildren();
    html("b", {}, this.element, head);
    const list = html("dl", {}, this.element);
    for (const [swatch, name, value] of lines) {
      const row = html("div", {}, list);
      const term = html("dt", {}, row);
      if (swatch) term.append(swatch);
      term.append(name);
      html("dd", {}, row, value);
    }
    this.element.hidden = false;
    if (width >= 520) {
      const right = x > width / 2;
      this.element.style.left = right ? "" : `${x + 14}px`;
      this.element.style.right = right ? `${width - x + 14}px` : "";
      this.element.style.top = `${top}px`;
    }
    this.element.classList.toggle("floating", width >= 520);
    return `${head}. ${lines.map(([, name, value, full]) => `${full || name}: ${value}.`).join(" ")}`;
  }
  hide() { this.element.hidden = true; }
}
