// Charts over rounds, drawn by uPlot (vendor/uPlot.iife.min.js) in the colours of the page's style sheet.

const HEIGHT = 190;
let drawn = [];
let series = null;
let place = null;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function bytes(value) {
  if (value == null) return "";
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return `${Number(value.toPrecision(3))} ${unit}`;
    value /= 1000;
  }
  return `${Number(value.toPrecision(3))} GB`;
}

function seconds(value) {
  return value == null ? "" : `${Number(value.toPrecision(3))} s`;
}

function number(value) {
  return value == null ? "" : String(Number(value.toPrecision(4)));
}

function line(label, values, stroke, show) {
  return { label, values, stroke, show };
}

// What is drawn: a title and lines, each of one colour in every chart that has its kind.
function wanted(data) {
  const charts = Object.entries(data.scores).map(([name, rows]) => ({
    title: name[0].toUpperCase() + name.slice(1),
    show: number,
    lines: Object.entries(rows).map(([of, values]) =>
      line(of === "devices" ? "on devices" : "by evaluators", values, of === "devices" ? "--accent" : "--violet"),
    ),
  }));
  charts.push({
    title: "Bytes a round",
    show: bytes,
    fromZero: true,
    lines: [line("down", data.download_bytes, "--cyan"), line("up", data.upload_bytes, "--accent")],
  });
  charts.push({ title: "Time of a round", show: seconds, fromZero: true, lines: [line("time", data.seconds, "--good")] });
  return charts;
}

function options(chart, width) {
  const ink = colour("--muted");
  const grid = { stroke: colour("--line"), width: 1 };
  const font = "12px system-ui, sans-serif";
  return {
    width,
    height: HEIGHT,
    cursor: { y: false, sync: { key: "rounds" } },
    legend: { show: false },
    // What a line is worth where the pointer is, else at its end.
    hooks: { setCursor: [(plot) => tell(chart, plot.cursor.idx)] },
    scales: { x: { time: false }, y: chart.fromZero ? { range: (u, low, high) => [0, high > 0 ? high * 1.1 : 1] } : {} },
    axes: [
      { stroke: ink, grid: { show: false }, ticks: grid, font, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] },
      { stroke: ink, grid, ticks: { show: false }, font, size: 62, values: (u, marks) => marks.map(chart.show) },
    ],
    series: [
      { label: "round" },
      ...chart.lines.map((each) => ({
        label: each.label,
        stroke: colour(each.stroke),
        width: 2,
        spanGaps: true,
        points: { show: chart.lines[0].values.length < 40, size: 5 },
      })),
    ],
  };
}

function draw() {
  for (const each of drawn) each.destroy();
  drawn = [];
  place.replaceChildren();
  place.hidden = series.rounds.length < 2;
  if (place.hidden) return;
  const charts = wanted(series).map((chart) => [chart, cardOf(chart)]);
  // All cards first: how wide one is depends on how many there are.
  for (const [chart, card] of charts) place.append(card);
  for (const [chart, card] of charts) {
    const data = [series.rounds, ...chart.lines.map((each) => each.values)];
    drawn.push(new uPlot(options(chart, card.clientWidth - 24), data, card.lastChild));
    tell(chart, null);
  }
}

function element(kind, className, text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

function cardOf(chart) {
  const card = element("figure", "card chart");
  const title = element("figcaption", "heading", chart.title);
  const keys = element("span", "keys");
  chart.where = element("span", "muted");
  keys.append(chart.where);
  for (const each of chart.lines) {
    const key = element("span", "key");
    each.told = element("b", "");
    key.append(element("i", `as${each.stroke}`), each.label, each.told);
    keys.append(key);
  }
  title.append(keys);
  const canvas = element("div", "");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", spoken(chart));
  card.append(title, canvas);
  return card;
}

function tell(chart, index) {
  chart.where.textContent = index == null ? "" : `round ${series.rounds[index]}`;
  for (const each of chart.lines) {
    const known = index == null ? each.values.findLast((value) => value != null) : each.values[index];
    each.told.textContent = chart.show(known);
  }
}

// For those who do not see the chart; the table of rounds has every number.
function spoken(chart) {
  const parts = chart.lines.map((each) => {
    const known = each.values.filter((value) => value != null);
    return `${each.label} from ${chart.show(known[0])} to ${chart.show(known.at(-1))}`;
  });
  return `${chart.title} over rounds ${series.rounds[0]} to ${series.rounds.at(-1)}: ${parts.join(", ")}`;
}

export function drawCharts(where, data) {
  place = where;
  series = data;
  draw();
}

function again() {
  if (series) draw();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
let resizing = 0;
let width = innerWidth;
addEventListener("resize", () => {
  // On phones the height changes with each scroll.
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(resizing);
  resizing = setTimeout(again, 150);
});
