"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colours = ["#3b82c4", "#e0812f", "#2f9e6e", "#c2528b", "#8b74cf", "#b8952b", "#3fa7b5", "#d0545f"];
const dark = matchMedia("(prefers-color-scheme: dark)");

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Curves. A long, noisy line is drawn faintly, with its running mean over a fiftieth of it on top.
function mean(values) {
  const reach = Math.ceil(values.length / 100), sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, i) => {
    const from = Math.max(0, i - reach), to = Math.min(values.length, i + reach + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

const dashes = ["solid", "dash", "dot", "dashdot"];

function traces(chart) {
  const several = data.runs.length > 1, keys = [...new Set(chart.lines.map((line) => line.key))];
  return chart.lines.flatMap((line) => {
    const color = colours[(several ? line.run : keys.indexOf(line.key)) % colours.length];
    const dash = several ? dashes[keys.indexOf(line.key) % dashes.length] : "solid";
    const name = several && keys.length > 1 ? `${line.name}, ${line.key}` : line.name;
    const trace = { type: "scatter", mode: line.x.length > 1 ? "lines" : "markers", name, x: line.x, y: line.y, hovertemplate: "%{y:.5g}" };
    const noisy = line.x.length > 100 && !/^(lr|ema_decay)/.test(line.key);
    if (!noisy) return [{ ...trace, line: { color, dash, width: 2 }, marker: { color } }];
    return [
      { ...trace, line: { color, width: 1 }, opacity: 0.3, showlegend: false, hoverinfo: "skip", hovertemplate: null },
      { ...trace, y: mean(line.y), line: { color, dash, width: 2 } },
    ];
  });
}

function layout(chart) {
  const style = getComputedStyle(document.documentElement), ink = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: ink("--line"), zerolinecolor: ink("--line"), linecolor: ink("--line"), automargin: true };
  const marks = data.runs.flatMap((run, i) => run.resumed.map((step) => ({ step, color: data.runs.length > 1 ? colours[i % colours.length] : ink("--quiet") })));
  return {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: "system-ui, sans-serif", size: 12, color: ink("--quiet") },
    margin: { l: 10, r: 10, t: 14, b: 10 },
    xaxis: { ...axis, tickformat: ",d", title: { text: "step", standoff: 4 } },
    yaxis: { ...axis, ...(chart.log ? { type: "log", dtick: "D2", tickformat: "~g" } : { type: "linear", nticks: 6 }) },
    hovermode: "x unified",
    hoverlabel: { bgcolor: ink("--card"), bordercolor: ink("--line"), font: { color: ink("--ink") } },
    showlegend: chart.lines.length > 1,
    legend: { orientation: "h", y: -0.3, yanchor: "top", x: 0 },
    shapes: marks.map(({ step, color }) => ({ type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line: { color, width: 1, dash: "dot" } })),
    annotations: data.runs.length > 1 ? [] : marks.map(({ step, color }) => ({ x: step, y: 1, yref: "paper", yanchor: "bottom", text: "resumed", showarrow: false, font: { size: 10, color } })),
  };
}

for (const chart of data.charts) {
  const plot = element("div", { className: "plot" }), button = element("button", { type: "button" });
  const draw = () => {
    button.textContent = chart.log ? "log scale" : "linear scale";
    return Plotly.react(plot, traces(chart), layout(chart), { displayModeBar: false });
  };
  button.title = "Switch between a logarithmic and a linear scale";
  button.onclick = () => { chart.log = !chart.log; draw(); };
  dark.addEventListener("change", draw);
  document.getElementById("charts").append(element("figure", {}, element("div", { className: "bar" }, element("h3", {}, chart.title), button), plot));
  draw();
  new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot);
}

// Samples. A run that drew nothing at a step shows what it drew last before it.
if (data.steps.length) {
  const slider = element("input", { type: "range", min: 0, max: data.steps.length - 1, value: data.steps.length - 1 });
  slider.setAttribute("aria-label", "step");
  const output = element("output"), grids = element("div", { className: "grids" });
  const show = () => {
    const step = data.steps[slider.value];
    output.textContent = `step ${step.toLocaleString("en")}`;
    grids.replaceChildren(...data.grids.flatMap((drawn, i) => {
      const last = Object.keys(drawn).map(Number).filter((other) => other <= step).pop();
      if (last === undefined) return [element("figure", {}, element("figcaption", {}, `${data.runs[i].name}: nothing yet`))];
      return Object.entries(drawn[last]).map(([kind, src]) => {
        const words = [data.runs.length > 1 ? data.runs[i].name : "", kind === "samples" ? "" : kind, last === step ? "" : `step ${last}`];
        const caption = words.filter(Boolean).join(", ");
        return element("figure", {}, element("img", { src, alt: `${kind} of step ${last}` }), element("figcaption", {}, caption));
      });
    }));
  };
  slider.oninput = show;
  document.getElementById("samples").append(element("div", { className: "slide" }, slider, output), grids);
  show();
}
