// Each figure for itself: one that fails keeps its drawing, and the reader loses nothing.
const charts = new Map();
const maps = new Set();
for (const figure of document.querySelectorAll("figure")) {
  try {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const label = figure.querySelector("svg[aria-label]").getAttribute("aria-label");
    if (figure.dataset.kind === "map") maps.add(new HeatMap(figure, spec, label));
    else charts.set(figure, new Chart(figure, spec, label));
  } catch (problem) {
    console.error(problem);
    for (const live of figure.querySelectorAll(".live")) live.remove();
  }
}
for (const article of document.querySelectorAll("article")) {
  const mine = [...charts].filter(([figure]) => article.contains(figure)).map(([, chart]) => chart);
  for (const howto of article.querySelectorAll(".howto")) howto.hidden = !mine.length && !maps.size;
  for (const key of article.querySelectorAll(".key")) {
    JSON.parse(key.querySelector("script").textContent).legend.forEach((entry, i) => {
      const made = html("button", { type: "button", "aria-pressed": "true" }, key);
      made.append(swatch({ ...entry, marked: entry.style !== "bar" }), entry.name);
      made.addEventListener("click", () => {
        const on = made.getAttribute("aria-pressed") !== "true";
        made.setAttribute("aria-pressed", String(on));
        for (const chart of mine) chart.showGroup(i, on);
      });
    });
    key.hidden = false;
  }
}
// On paper nothing can be clicked.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details.more")) folded.open = true;
});
