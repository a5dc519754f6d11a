// Axes and the looks of curves: measured words, ticks, markers, swatches.
const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const ruler = document.createElement("canvas").getContext("2d");

function widthOf(words) {
  ruler.font = FONT;
  return ruler.measureText(words).width;
}

// Names may stand level under an axis when no word is wider than its slot.
const fitsLevel = (names, slot) => names.every((name) => name.split(" ").every((word) => widthOf(word) <= slot - 6));

// A name that does not fit loses its middle: names often differ at the end.
function shortened(name, room) {
  let shown = name;
  for (let n = name.length - 1; widthOf(shown) > room && n > 2; n--) {
    shown = `${name.slice(0, Math.ceil((n - 1) / 2))}…${name.slice(name.length - Math.floor((n - 1) / 2))}`;
  }
  return shown;
}

// Lines of at most `room` pixels, at most `most` of them.
function wrapped(name, room, most) {
  const lines = [""];
  for (const word of name.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (!lines.at(-1) || widthOf(longer) <= room || lines.length === most) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines.map((line) => shortened(line, room));
}

function markerPath(shape, x, y, r) {
  const polygon = (...points) => `M${points.map(([a, b]) => `${x + a * r},${y + b * r}`).join("L")}Z`;
  const t = 0.38;
  switch (shape) {
    case "s": return polygon([-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]);
    case "^": return polygon([0, -1.1], [1.1, 0.9], [-1.1, 0.9]);
    case "v": return polygon([0, 1.1], [1.1, -0.9], [-1.1, -0.9]);
    case "D": return polygon([0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]);
    case "P": return polygon([-t, -1.1], [t, -1.1], [t, -t], [1.1, -t], [1.1, t], [t, t], [t, 1.1], [-t, 1.1], [-t, t],
      [-1.1, t], [-1.1, -t], [-t, -t]);
    case "X": return polygon([0, -0.5], [0.6, -1.1], [1.1, -0.6], [0.5, 0], [1.1, 0.6], [0.6, 1.1], [0, 0.5], [-0.6, 1.1],
      [-1.1, 0.6], [-0.5, 0], [-1.1, -0.6], [-0.6, -1.1]);
    default: return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
  }
}

// How a curve looks in a legend or a readout; ink: an entry that stands for curves of several colours.
function swatch(s, ink = false) {
  const made = draw("svg", { viewBox: "0 0 26 12", class: "swatch", "aria-hidden": "true" });
  made.style.color = `var(--${ink ? "ink" : s.colour})`;
  if (s.style === "bar") draw("rect", { x: 3, y: 1, width: 20, height: 10, opacity: s.hollow ? 0.45 : 0.9, class: "filled" }, made);
  else if (s.style !== "points") draw("path", { d: "M0,6H26", ...strokeOf(s) }, made);
  if (s.marked) draw("path", { d: markerPath(s.marker, 13, 6, 3.6), class: s.hollow ? "hollow" : "filled" }, made);
  return made;
}

const strokeOf = (s) => ({
  class: s.style === "fit" ? "thin" : "line",
  "stroke-dasharray": s.dashes.map((d) => d * 2).join(" "),
  opacity: s.pale ? 0.55 : 1,
});

// Steps of 1, 2, 2.5 or 5 times a power of ten, at most about `most` of them.
function linearTicks(low, high, most) {
  const raw = (high - low) / most;
  const ten = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((s) => s * ten).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// [words of each tick, their common factor]
function linearWords(ticks) {
  const size = Math.max(...ticks.map(Math.abs), 0);
  const order = size === 0 || (size >= 0.99e-3 && size < 1e5) ? 0 : parts(size)[1];
  const scaled = ticks.map((v) => Number((v / 10 ** order).toPrecision(10)));
  const decimals = Math.max(0, ...scaled.map((v) => (String(v).split(".")[1] || "").length));
  return [scaled.map((v) => fixed(v, Math.min(9, decimals))), order ? `×${power(order)}` : ""];
}

function logTicks(low, high, most) {
  const decades = Math.log10(high / low);
  if (decades < 0.5) return linearTicks(low, high, 5);
  const every = Math.max(1, Math.ceil(decades / most));
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high) + 1e-9; e++)
    for (const m of decades < 2 ? [1, 2, 5] : [1]) if (e % every === 0) found.push(Number(`${m}e${e}`));
  return found.filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
}

function logWords(ticks) {
  const everyday = ticks.length && ticks[0] >= 0.9e-3 && ticks.at(-1) < 1.1e5;
  return ticks.map((v) => {
    if (everyday) return String(Number(v.toPrecision(6)));
    const [m, e] = parts(Number(v.toPrecision(4)));
    return m === "1" ? power(e) : `${m}×${power(e)}`;
  });
}
