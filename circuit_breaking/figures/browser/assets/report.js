// Draws the plots and graphs of the page from the JSON that it holds, and sorts tables.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const grid = { gridcolor: "#e6e9ed", zerolinecolor: "#c3cad2", linecolor: "#9aa4af", ticks: "outside", tickcolor: "#9aa4af", ticklen: 4, automargin: true };
  // only these buttons: Plotly also offers to send a plot to its servers
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };

  // Lines of a legend below a plot, about
  const linesOf = (names, width) => Math.ceil([...names].reduce((sum, name) => sum + 60 + 6.2 * name.length, 0) / Math.max(width - 60, 200));

  // The layout of a plot: its own settings over the style that all share.
  function layoutOf(plot, width) {
    const own = plot.layout;
    const names = new Set(plot.traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name));
    return {
      height: 300 + 17 * (names.size > 1 ? linesOf(names, width) : 0), margin: { l: 52, r: 14, t: 30, b: 44 }, hovermode: "closest", showlegend: names.size > 1,
      font: { family: "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 12, color: "#1d2733" },
      legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", font: { size: 11.5 } },
      paper_bgcolor: "#fff", plot_bgcolor: "#fff", hoverlabel: { font: { size: 12 } }, ...own,
      xaxis: { ...grid, showgrid: false, ...own.xaxis }, yaxis: { ...grid, ...own.yaxis },
    };
  }

  // Plotly lets a legend have half of a plot's height and scrolls the rest. Make the plot as much taller as is hidden.
  function showLegend(place) {
    const { legend, height } = place._fullLayout;
    const hidden = legend ? legend._height - legend._effHeight : 0;
    if (!(hidden > 1)) return;
    place.style.minHeight = `${height + 2 * hidden}px`;
    Plotly.relayout(place, { height: height + 2 * hidden });
  }

  for (const place of document.querySelectorAll("[data-plot]")) {
    const plot = data.plots[Number(place.dataset.plot)];
    const layout = layoutOf(plot, place.clientWidth);
    place.style.minHeight = `${layout.height}px`;
    Plotly.newPlot(place, plot.traces, layout, config).then(() => {
      showLegend(place);
      place.on("plotly_afterplot", () => showLegend(place)); // after a change of the width too
    });
  }

  for (const place of document.querySelectorAll("[data-graph]")) {
    EdgeGraph.show(place, data.graphs[Number(place.dataset.graph)]);
  }

  // Plots have a width in pixels, which must fit a page of paper: alone, or two side by side.
  const plots = [...document.querySelectorAll("[data-plot]")];
  window.addEventListener("beforeprint", () => {
    for (const place of plots) Plotly.relayout(place, { width: place.closest(".plots").children.length > 1 ? 330 : 680 });
  });
  window.addEventListener("afterprint", () => {
    for (const place of plots) Plotly.relayout(place, { width: null, autosize: true });
  });

  // A click on the head of a column sorts the table by it: figures by size, names by the alphabet.
  for (const table of document.querySelectorAll("main table")) {
    const body = table.tBodies[0];
    table.tHead?.addEventListener("click", (event) => {
      const head = event.target.closest("th");
      if (!head || table.closest(".top") || table.classList.contains("words")) return;
      const down = head.dataset.sorted !== "down";
      for (const other of head.parentNode.children) delete other.dataset.sorted;
      head.dataset.sorted = down ? "down" : "up";
      const value = (row) => row.cells[head.cellIndex].textContent.trim();
      const number = (text) => Number.parseFloat(text.replaceAll(",", ""));
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [number(value(one)), number(value(other))];
        if (Number.isNaN(a) || Number.isNaN(b)) return value(one).localeCompare(value(other), "en", { numeric: true });
        return b - a;
      });
      body.append(...(down ? rows : rows.reverse()));
    });
  }

  document.documentElement.dataset.ready = "yes";
})();
