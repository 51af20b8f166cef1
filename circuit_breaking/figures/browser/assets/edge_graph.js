// An interactive graph of edges: the reader chooses how many edges are drawn, a layer, kinds of nodes, and a node or
// edge to find, and points at an edge to see its value.
//
// Drawing is spread over frames, so that the page stays responsive while all edges of a large model are drawn. The
// most important edges are drawn as curves. The others lie behind them and are drawn pixel by pixel, the most important
// first, which is much faster than thousands of curves where no graphics card helps. While the reader moves or zooms,
// the last picture is moved or scaled; the edges are drawn again when the movement ends.
"use strict";

const EdgeGraph = (() => {
  const COLOURS = { embed: "#111111", head: "#0072B2", MLP: "#D55E00" }; // by the kind of node that writes
  const LEVELS = 24; // levels of width and shade; all edges of one level are drawn with one stroke
  const FAINT = LEVELS; // the shade of edges that a search does not find
  const SHARP = 1000; // the most edges that are drawn as curves
  const SLOW = 45; // milliseconds; if a frame takes longer, the next one draws fewer curves
  const BUDGET = 10; // milliseconds per frame for drawing pixels
  const MOST_ROWS = 100; // most rows of the list of edges
  const KINDS = Object.keys(COLOURS);
  const QKV = ["q", "k", "v"];

  // Nodes, readers and edges of a graph, numbered as `EdgeGraph` in graph.py does.
  class Shape {
    constructor({ n_layers: layers, n_heads: heads, split_qkv: split, parallel }) {
      Object.assign(this, { layers, heads, split });
      this.nodes = ["embed"];
      for (let layer = 0; layer < layers; layer++) {
        for (let head = 0; head < heads; head++) this.nodes.push(`a${layer}.${head}`);
        this.nodes.push(`m${layer}`);
      }
      this.nodes.push("output");
      this.number = new Map(this.nodes.map((name, index) => [name, index]));
      this.readers = []; // [node, suffix, number of the reader's first edge]
      this.size = 0;
      const add = (node, suffix, count) => {
        this.readers.push([node, suffix, this.size]);
        this.size += count;
      };
      for (let layer = 0; layer < layers; layer++) {
        const earlier = 1 + layer * (heads + 1);
        for (let head = 0; head < heads; head++) {
          for (const suffix of split ? QKV.map((part) => `.${part}`) : [""]) add(earlier + head, suffix, earlier);
        }
        add(earlier + heads, "", earlier + (parallel ? 0 : heads));
      }
      add(this.nodes.length - 1, "", this.nodes.length - 1);
      const middle = (heads - 1) / 2;
      this.x = new Float32Array(this.nodes.length);
      this.y = new Float32Array(this.nodes.length);
      this.layer = new Int16Array(this.nodes.length);
      this.nodes.forEach((name, index) => {
        const [, kind, layer, head] = /^([am])(\d+)(?:\.(\d+))?$/.exec(name) ?? [];
        this.layer[index] = kind ? Number(layer) : name === "embed" ? -1 : layers;
        this.x[index] = kind === "a" ? Number(head) : kind === "m" ? heads + 0.8 : middle;
        this.y[index] = this.layer[index] + (kind === "m" && !parallel ? 0.5 : 0);
      });
    }

    // Number of the writing node, of the reading node, and the suffix of the reader, of an edge.
    ends(edge) {
      let [low, high] = [0, this.readers.length - 1];
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (this.readers[middle][2] <= edge) low = middle;
        else high = middle - 1;
      }
      const [node, suffix, first] = this.readers[low];
      return [edge - first, node, suffix];
    }

    kind(node) {
      return { a: "head", m: "MLP" }[this.nodes[node][0]] ?? "embed";
    }
  }

  function decode(text, type) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new type(bytes.buffer);
  }

  // Control points of the curve of an edge, in units of the layout: x0, y0, x1, y1, x2, y2, x3, y3.
  function curve(shape, source, target, out, at) {
    const [x0, y0, x3, y3] = [shape.x[source], shape.y[source], shape.x[target], shape.y[target]];
    const rise = y3 - y0;
    if (shape.layer[source] === shape.layer[target]) { // from a head to the MLP of its layer: above the other heads
      const lane = y0 + 0.2 + 0.5 * ((shape.heads - x0) / shape.heads);
      out.set([x0, y0, x0 + 0.1, lane, x3 - 1.2, lane, x3, y3], at);
      return;
    }
    const bend = Math.abs(x3 - x0) > 0.6 || rise < 1.2 ? 0 : Math.min(0.3 + 0.13 * rise, 1.9);
    const lift = 0.45 * Math.max(rise, 0.5);
    out.set([x0, y0, x0 + bend, y0 + lift, x3 + bend, y3 - lift, x3, y3], at);
  }

  function prepare(list) {
    const shape = new Shape(list.graph);
    const [order, values] = [decode(list.order, list.wide ? Uint32Array : Uint16Array), decode(list.values, Float32Array)];
    const count = order.length;
    const [source, target, points] = [new Uint16Array(count), new Uint16Array(count), new Float32Array(8 * count)];
    const [suffix, kind] = [new Array(count), new Uint8Array(count)];
    let largest = 0;
    for (let at = 0; at < count; at++) {
      const [from, to, part] = shape.ends(order[at]);
      source[at] = from;
      target[at] = to;
      suffix[at] = part;
      kind[at] = KINDS.indexOf(shape.kind(from));
      curve(shape, from, to, points, 8 * at);
      largest = Math.max(largest, Math.abs(values[at]));
    }
    const level = Uint8Array.from(values, (value) => Math.round((LEVELS - 1) * Math.abs(value) / (largest || 1)));
    const name = (at) => `${shape.nodes[source[at]]}->${shape.nodes[target[at]]}${suffix[at]}`;
    return { ...list, shape, order, values, source, target, suffix, kind, level, points, count, name };
  }

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const figure = (value) => (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? value.toPrecision(4) : value.toExponential(2));

  // Show the graph of one or more lists of edges in an element of the page.
  function show(place, lists) {
    const prepared = new Map(); // lists that were shown, by number
    let list, k, hovered = -1, node = -1, frame = 0, drawn = 0, portion = 1500, picture = null, settle = 0;
    let transform = d3.zoomIdentity;
    const kinds = new Set(Object.keys(COLOURS));

    const choice = element("select", {}, ...lists.map((one, at) => element("option", { value: at, textContent: one.title })));
    const slider = element("input", { type: "range", min: 0, max: 1000, step: 1 });
    slider.setAttribute("aria-label", "number of edges");
    const number = element("input", { type: "number", min: 0 });
    const layer = element("select");
    const names = element("datalist", { id: `nodes-${place.dataset.graph}` });
    const search = element("input", { type: "search", placeholder: "a3.1 or a3.1->m5" });
    search.setAttribute("list", names.id);
    const whole = element("button", { type: "button", textContent: "Reset zoom" });
    const label = (text, input, className = "") => element("label", { className }, element("span", { textContent: text }), input);
    const controls = element("div", { className: "controls" });
    if (lists.length > 1) controls.append(label("edges of", choice));
    controls.append(label("first edges", slider, "wide"), label("number", number), label("layer", layer), label("node or edge", search), whole, names);
    const output = element("output");
    const legend = element("div", { className: "legend" });
    for (const [kind, colour] of Object.entries(COLOURS)) {
      const box = element("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        box.checked ? kinds.add(kind) : kinds.delete(kind);
        redraw();
      });
      const sample = element("i");
      sample.style.background = colour;
      legend.append(element("label", {}, box, sample, `from ${kind}`));
    }
    const holder = element("div", { className: "canvas" });
    const [mass, base, over] = [element("canvas"), element("canvas", { className: "curves" }), element("canvas")];
    const tip = element("div", { className: "tip" });
    holder.append(mass, base, over, tip);
    const rows = element("tbody");
    const measure = element("th", { scope: "col" });
    const head = element("thead", {}, element("tr", {}, element("th", { scope: "col", textContent: "edge" }), measure));
    const listed = element("p");
    const top = element("div", { className: "top" }, listed, element("div", { className: "list" }, element("table", {}, head, rows)));
    place.append(controls, element("div", { className: "state" }, output, legend), element("div", { className: "body" }, holder, top));

    const [massPen, pen, overPen] = [mass, base, over].map((canvas) => canvas.getContext("2d"));
    let pixels = null; // of the canvas `mass`
    let [width, height, ratio, unitX, unitY, left, bottom] = [0, 0, 1, 1, 1, 0, 0];

    // Pixels of a position of the layout, with the zoom of the reader.
    const toX = (x) => transform.applyX(left + x * unitX);
    const toY = (y) => transform.applyY(bottom - y * unitY);

    function fit() {
      const { shape } = list;
      width = holder.clientWidth || 800;
      height = Math.round(Math.min(Math.max(340, 62 * (shape.layers + 2)), Math.max(480, Math.min(900, 0.92 * window.innerHeight))));
      holder.style.height = `${height}px`;
      ratio = Math.min(window.devicePixelRatio || 1, 2);
      for (const canvas of [mass, base, over]) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
      }
      pixels = massPen.createImageData(mass.width, mass.height);
      const gutter = width < 560 ? 30 : 64; // for the names of layers
      unitX = Math.min((width - gutter - 30) / (shape.heads + 2.3), 120);
      unitY = (height - 48) / (shape.layers + 1.1);
      left = gutter + 0.4 * unitX + (width - gutter - 30 - unitX * (shape.heads + 2.3)) / 2;
      bottom = height - 22 - unitY;
      zoom.translateExtent([[-0.2 * width, -0.2 * height], [1.2 * width, 1.2 * height]]);
    }

    // The reader's choice (kinds that are shown, a layer or null, a text to find), and the nodes on the edges found.
    let chosen = { kinds: [], layer: null, text: "" };
    let active = new Uint8Array(0);

    function choose() {
      chosen = { kinds: KINDS.map((kind) => kinds.has(kind)), layer: layer.value === "" ? null : Number(layer.value), text: search.value.trim() };
      active = new Uint8Array(list.shape.nodes.length);
      for (let at = 0; at < k; at++) {
        if (passes(at) && found(at)) active[list.source[at]] = active[list.target[at]] = 1;
      }
    }

    // Whether an edge of the list passes the choice of kinds and layer.
    function passes(at) {
      if (!chosen.kinds[list.kind[at]]) return false;
      if (chosen.layer === null) return true;
      const layers = list.shape.layer;
      return layers[list.source[at]] === chosen.layer || layers[list.target[at]] === chosen.layer;
    }

    // Whether the edge is highlighted: there is no search, or the edge matches it.
    function found(at) {
      const { text } = chosen;
      if (text === "") return true;
      if (node >= 0) return list.source[at] === node || list.target[at] === node;
      return text.includes("->") ? list.name(at).startsWith(text) : list.name(at).includes(text);
    }

    function trace(context, at) {
      const p = list.points, i = 8 * at;
      context.moveTo(toX(p[i]), toY(p[i + 1]));
      context.bezierCurveTo(toX(p[i + 2]), toY(p[i + 3]), toX(p[i + 4]), toY(p[i + 5]), toX(p[i + 6]), toY(p[i + 7]));
    }

    const widthOf = (level) => (0.5 + 3 * ((level % LEVELS) / (LEVELS - 1))) * Math.min(1.6, 0.7 + 0.3 * transform.k);

    // Colour of each kind and level; less important edges are paler.
    function palette(least = 0) {
      const crowded = k > 60;
      return KINDS.map((kind) => Array.from({ length: LEVELS + 1 }, (_, level) => {
        const share = level / (LEVELS - 1);
        const fade = level === FAINT ? 0.88 : crowded ? 0.72 * (1 - Math.sqrt(share)) : 0.45 * (1 - share);
        return d3.interpolateRgb(COLOURS[kind], "#ffffff")(Math.max(fade, least));
      }));
    }

    // Draw edges behind those already drawn, with one stroke for all edges of one kind and level.
    function behind(from, to, colours) {
      const groups = new Map();
      for (let at = from; at < to; at++) {
        if (!passes(at)) continue;
        drawn++;
        const style = list.kind[at] * (LEVELS + 1) + (found(at) ? list.level[at] : FAINT);
        if (!groups.has(style)) groups.set(style, []);
        groups.get(style).push(at);
      }
      pen.globalCompositeOperation = "destination-over";
      for (const [style, members] of [...groups].sort(([one], [other]) => (other % (LEVELS + 1)) - (one % (LEVELS + 1)))) {
        const level = style % (LEVELS + 1);
        pen.strokeStyle = colours[Math.floor(style / (LEVELS + 1))][level];
        pen.lineWidth = widthOf(level);
        pen.beginPath();
        for (const at of members) trace(pen, at);
        pen.stroke();
      }
      pen.globalCompositeOperation = "source-over";
    }

    // Set those pixels of a curve that no earlier, more important edge has set.
    function dots(buffer, at, colour) {
      const p = list.points, i = 8 * at;
      const [x0, y0, x1, y1, x2, y2, x3, y3] = [toX(p[i]), toY(p[i + 1]), toX(p[i + 2]), toY(p[i + 3]), toX(p[i + 4]), toY(p[i + 5]), toX(p[i + 6]), toY(p[i + 7])].map((value) => value * ratio);
      const [columns, lines] = [mass.width, mass.height];
      if (Math.max(x0, x1, x2, x3) < 0 || Math.min(x0, x1, x2, x3) > columns || Math.max(y0, y1, y2, y3) < 0 || Math.min(y0, y1, y2, y3) > lines) return;
      const steps = Math.ceil(1.25 * Math.max(Math.abs(x1 - x0) + Math.abs(x2 - x1) + Math.abs(x3 - x2), Math.abs(y1 - y0) + Math.abs(y2 - y1) + Math.abs(y3 - y2))) + 1;
      const h = 1 / steps; // forward differences of the cubic curve
      const [ax, bx, cx] = [x3 - 3 * x2 + 3 * x1 - x0, 3 * (x2 - 2 * x1 + x0), 3 * (x1 - x0)];
      const [ay, by, cy] = [y3 - 3 * y2 + 3 * y1 - y0, 3 * (y2 - 2 * y1 + y0), 3 * (y1 - y0)];
      let [x, dx, ddx] = [x0, ax * h ** 3 + bx * h ** 2 + cx * h, 6 * ax * h ** 3 + 2 * bx * h ** 2];
      let [y, dy, ddy] = [y0, ay * h ** 3 + by * h ** 2 + cy * h, 6 * ay * h ** 3 + 2 * by * h ** 2];
      const [dddx, dddy] = [6 * ax * h ** 3, 6 * ay * h ** 3];
      for (let step = 0; step <= steps; step++) {
        if (x >= 0 && x < columns && y >= 0 && y < lines) {
          const pixel = (y | 0) * columns + (x | 0);
          if (buffer[pixel] === 0) buffer[pixel] = colour;
        }
        x += dx; dx += ddx; ddx += dddx;
        y += dy; dy += ddy; ddy += dddy;
      }
    }

    // Draw all edges that the reader chose, over several frames.
    function redraw() {
      cancelAnimationFrame(frame);
      clearTimeout(settle);
      [drawn, hovered] = [0, -1];
      base.dataset.done = "no";
      for (const one of [massPen, pen]) {
        one.setTransform(1, 0, 0, 1, 0, 0);
        one.clearRect(0, 0, base.width, base.height);
      }
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      choose();
      continueCurves(0, palette(), performance.now());
      drawOver();
    }

    function continueCurves(from, colours, before) {
      const now = performance.now();
      if (from > 0) portion = now - before > SLOW ? Math.max(100, portion / 2) : Math.min(SHARP, portion * 1.5);
      const end = Math.min(k, SHARP), to = Math.min(end, from + Math.round(portion));
      behind(from, to, colours);
      if (to < end) frame = requestAnimationFrame(() => continueCurves(to, colours, now));
      else if (end < k) startDots(end, palette(0.7)); // pale, so that the curves before them stand out
      else finish();
    }

    function startDots(from, colours) {
      const bytes = new Uint8Array(4);
      const number = new Uint32Array(bytes.buffer); // a pixel as one number, in the machine's byte order
      const packed = colours.map((levels) => levels.map((colour) => {
        const { r, g, b } = d3.rgb(colour);
        bytes.set([r, g, b, 255]);
        return number[0];
      }));
      const buffer = new Uint32Array(pixels.data.buffer);
      buffer.fill(0);
      frame = requestAnimationFrame(() => continueDots(from, buffer, packed));
    }

    function continueDots(from, buffer, colours) {
      const until = performance.now() + BUDGET;
      let at = from;
      while (at < k && (at === from || at % 32 || performance.now() < until)) {
        if (passes(at)) {
          dots(buffer, at, colours[list.kind[at]][found(at) ? list.level[at] : FAINT]);
          drawn++;
        }
        at++;
      }
      massPen.putImageData(pixels, 0, 0);
      if (at < k) frame = requestAnimationFrame(() => continueDots(at, buffer, colours));
      else finish();
    }

    function finish() {
      picture = { transform, images: null };
      base.dataset.drawn = drawn;
      base.dataset.done = "yes";
      output.textContent = `${drawn.toLocaleString("en")} of ${list.shape.size.toLocaleString("en")} edges drawn; width: ${list.measure}`;
      clearTimeout(settle);
      settle = setTimeout(fillRows, 120);
    }

    // Draw nodes, names of layers, and the edge that the reader points at.
    function drawOver() {
      overPen.setTransform(1, 0, 0, 1, 0, 0);
      overPen.clearRect(0, 0, over.width, over.height);
      overPen.setTransform(ratio, 0, 0, ratio, 0, 0);
      const { shape } = list;
      for (const [colour, extra] of hovered >= 0 ? [["#ffffff", 5.5], [COLOURS[KINDS[list.kind[hovered]]], 1.5]] : []) {
        overPen.strokeStyle = colour;
        overPen.lineWidth = widthOf(list.level[hovered]) + extra;
        overPen.beginPath();
        trace(overPen, hovered);
        overPen.stroke();
      }
      const [roomX, roomY] = [unitX * transform.k, unitY * transform.k];
      const size = Math.max(8, Math.min(11, 0.3 * roomX, 0.42 * roomY));
      overPen.font = `${size}px system-ui, "DejaVu Sans", sans-serif`;
      overPen.textAlign = "center";
      overPen.textBaseline = "middle";
      const labelled = roomX > 31 && roomY > 15;
      shape.nodes.forEach((name, index) => {
        const [x, y] = [toX(shape.x[index]), toY(shape.y[index])];
        const end = index === 0 || index === shape.nodes.length - 1;
        const colour = end ? "#111111" : COLOURS[shape.kind(index)];
        if (!active[index] && !end && index !== node) {
          overPen.fillStyle = "#d3d8de";
          overPen.beginPath();
          overPen.arc(x, y, 2, 0, 7);
          overPen.fill();
        } else if (labelled || end || index === node) {
          const half = overPen.measureText(name).width / 2 + 4;
          overPen.fillStyle = active[index] ? colour : "#ffffff";
          overPen.strokeStyle = index === node ? "#E69F00" : colour;
          overPen.lineWidth = index === node ? 2.5 : 1;
          overPen.beginPath();
          overPen.roundRect(x - half, y - size * 0.75, 2 * half, size * 1.5, 3);
          overPen.fill();
          overPen.stroke();
          overPen.fillStyle = active[index] ? "#ffffff" : colour;
          overPen.fillText(name, x, y + 0.5);
        } else {
          overPen.fillStyle = colour;
          overPen.beginPath();
          overPen.arc(x, y, 3.5, 0, 7);
          overPen.fill();
        }
      });
      overPen.fillStyle = "#55606c";
      overPen.textAlign = "left";
      overPen.font = '11px system-ui, "DejaVu Sans", sans-serif';
      const every = Math.max(1, Math.ceil(15 / roomY));
      for (let at = 0; at < shape.layers; at += every) {
        const y = toY(at);
        if (y > 6 && y < height - 6) overPen.fillText(width < 560 ? `${at}` : `layer ${at}`, 8, y);
      }
    }

    function fillRows() {
      const shown = [];
      for (let at = 0; at < k && shown.length < MOST_ROWS; at++) {
        if (passes(at) && found(at)) shown.push(at);
      }
      rows.replaceChildren(...shown.map((at) => {
        const row = element("tr", {}, element("th", { scope: "row", textContent: list.name(at) }), element("td", { textContent: figure(list.values[at]) }));
        row.addEventListener("mouseenter", () => point(at, middle(at)));
        row.addEventListener("mouseleave", () => point(-1, null));
        return row;
      }));
      measure.textContent = list.measure;
      listed.textContent = shown.length < MOST_ROWS ? "These edges, the most important first" : `The first ${MOST_ROWS} of these edges`;
    }

    // The midpoint of an edge's curve, moved inside the picture.
    function middle(at) {
      const p = list.points, i = 8 * at;
      const half = (j) => (p[j] + 3 * p[j + 2] + 3 * p[j + 4] + p[j + 6]) / 8;
      return [Math.max(0, Math.min(width, toX(half(i)))), Math.max(0, Math.min(height, toY(half(i + 1))))];
    }

    // Highlight one edge, and show its name and value beside the pointer.
    function point(at, position, about = null) {
      if (at !== hovered) {
        hovered = at;
        drawOver();
      }
      if (!position || (at < 0 && !about)) {
        tip.style.display = "none";
        return;
      }
      const lines = about ?? [
        list.name(at), `${list.measure}: ${figure(list.values[at])}`, `number ${(at + 1).toLocaleString("en")} of this list`,
        ...(list.notes[list.order[at]] ?? []).map(([name, text]) => `${name}: ${text}`),
      ];
      tip.replaceChildren(...lines.map((line, index) => element(index ? "span" : "b", { textContent: line })));
      tip.style.display = "block";
      [tip.dataset.x, tip.dataset.y] = position;
      const [x, y] = position;
      tip.style.left = `${Math.max(4, Math.min(x + 14, width - tip.offsetWidth - 6))}px`;
      tip.style.top = `${y + 18 + tip.offsetHeight > height ? Math.max(0, y - tip.offsetHeight - 12) : y + 18}px`;
    }

    // The edge nearest to a position, within 6 pixels; -1 if there is none.
    function nearest(x, y) {
      let [best, distance] = [-1, 6];
      const p = list.points;
      // the position and 6 pixels in units of the layout
      const [atX, atY] = [(transform.invertX(x) - left) / unitX, (bottom - transform.invertY(y)) / unitY];
      const [nearX, nearY] = [6 / (unitX * transform.k), 6 / (unitY * transform.k)];
      for (let at = 0; at < k; at++) {
        const i = 8 * at;
        if (atY < p[i + 1] - nearY || atY > Math.max(p[i + 3], p[i + 5], p[i + 7]) + nearY) continue;
        if (atX < Math.min(p[i], p[i + 2], p[i + 4], p[i + 6]) - nearX || atX > Math.max(p[i], p[i + 2], p[i + 4], p[i + 6]) + nearX) continue;
        if (!passes(at)) continue;
        const away = distanceTo(i, x, y);
        if (away < distance) [best, distance] = [at, away];
      }
      return best;
    }

    // Distance in pixels from a position to the curve whose points start at `i`.
    function distanceTo(i, x, y) {
      const p = list.points;
      let [least, lastX, lastY] = [Infinity, toX(p[i]), toY(p[i + 1])];
      for (let step = 1; step <= 20; step++) {
        const t = step / 20, u = 1 - t;
        const [a, b, c, d] = [u * u * u, 3 * u * u * t, 3 * u * t * t, t * t * t];
        const nextX = toX(a * p[i] + b * p[i + 2] + c * p[i + 4] + d * p[i + 6]);
        const nextY = toY(a * p[i + 1] + b * p[i + 3] + c * p[i + 5] + d * p[i + 7]);
        const dx = nextX - lastX, dy = nextY - lastY;
        const along = Math.max(0, Math.min(1, ((x - lastX) * dx + (y - lastY) * dy) / (dx * dx + dy * dy || 1)));
        least = Math.min(least, Math.hypot(x - lastX - along * dx, y - lastY - along * dy));
        lastX = nextX;
        lastY = nextY;
      }
      return least;
    }

    function nodeAt(x, y) {
      const { shape } = list;
      return shape.nodes.findIndex((_, index) => Math.abs(toX(shape.x[index]) - x) < 9 && Math.abs(toY(shape.y[index]) - y) < 8);
    }

    function aboutNode(index) {
      let [out, into] = [0, 0];
      for (let at = 0; at < k; at++) {
        if (passes(at)) {
          out += list.source[at] === index;
          into += list.target[at] === index;
        }
      }
      return [list.shape.nodes[index], `drawn edges: ${into.toLocaleString("en")} into it, ${out.toLocaleString("en")} out of it`];
    }

    let waiting = null; // the last position of the pointer, which the next frame uses
    over.addEventListener("pointermove", (event) => {
      if (event.buttons) return;
      if (!waiting) requestAnimationFrame(lookUp);
      waiting = d3.pointer(event, over);
    });
    function lookUp() {
      const position = waiting;
      waiting = null;
      const at = nodeAt(...position);
      if (at >= 0) point(-1, position, aboutNode(at));
      else point(nearest(...position), position);
    }
    over.addEventListener("pointerleave", () => point(-1, null));
    over.addEventListener("click", (event) => {
      const at = nodeAt(...d3.pointer(event, over));
      if (at < 0) return;
      search.value = search.value === list.shape.nodes[at] ? "" : list.shape.nodes[at];
      searched();
    });

    // During a movement the last picture is moved or scaled; the edges are drawn again when it ends.
    function moved(event) {
      if (picture && !picture.images && base.dataset.done === "yes") {
        picture.images = [mass, base].map((canvas) => {
          const copy = element("canvas", { width: canvas.width, height: canvas.height });
          copy.getContext("2d").drawImage(canvas, 0, 0);
          return copy;
        });
      }
      transform = event.transform;
      if (k <= 300 || !picture?.images) {
        redraw();
        return;
      }
      cancelAnimationFrame(frame);
      base.dataset.done = "no";
      const scale = transform.k / picture.transform.k;
      const [x, y] = [transform.x - scale * picture.transform.x, transform.y - scale * picture.transform.y];
      for (const [index, one] of [massPen, pen].entries()) {
        one.setTransform(1, 0, 0, 1, 0, 0);
        one.clearRect(0, 0, base.width, base.height);
        one.setTransform(scale, 0, 0, scale, x * ratio, y * ratio);
        one.drawImage(picture.images[index], 0, 0);
      }
      tip.style.display = "none";
      hovered = -1;
      drawOver();
      clearTimeout(settle);
      settle = setTimeout(redraw, 160);
    }
    const zoom = d3.zoom().scaleExtent([1, 12]).on("zoom", moved);
    // one finger scrolls the page, and so does the wheel until the graph is clicked: the graph never stops scrolling
    zoom.filter((event) => !event.button && !(event.touches?.length < 2) && (event.type !== "wheel" || event.ctrlKey || event.metaKey || document.activeElement === over || holder.dataset.wheel === "yes"));
    d3.select(over).call(zoom).on("dblclick.zoom", null);
    over.addEventListener("pointerdown", () => { holder.dataset.wheel = "yes"; });
    over.addEventListener("pointerleave", () => { holder.dataset.wheel = ""; });
    whole.addEventListener("click", () => d3.select(over).call(zoom.transform, d3.zoomIdentity));

    // The slider is logarithmic, because the first edges matter most.
    const toCount = (position) => (list.count <= 200 ? Math.round((position / 1000) * list.count) : Math.round(Math.expm1((position / 1000) * Math.log1p(list.count))));
    const toPosition = (count) => Math.round(1000 * (list.count <= 200 ? count / (list.count || 1) : Math.log1p(count) / Math.log1p(list.count)));

    function setCount(count) {
      k = Math.max(0, Math.min(list.count, Math.round(count) || 0));
      number.value = k;
      redraw();
    }
    slider.addEventListener("input", () => setCount(toCount(Number(slider.value))));
    number.addEventListener("input", () => {
      setCount(Number(number.value));
      slider.value = toPosition(k);
    });
    layer.addEventListener("change", redraw);
    function searched() {
      node = list.shape.number.get(search.value.trim()) ?? -1;
      redraw();
    }
    search.addEventListener("input", searched);
    choice.addEventListener("change", () => open(Number(choice.value)));
    new ResizeObserver(() => {
      if (holder.clientWidth !== width) {
        fit();
        redraw();
      }
    }).observe(holder);

    function open(at) {
      if (!prepared.has(at)) prepared.set(at, prepare(lists[at]));
      list = prepared.get(at);
      const { shape } = list;
      layer.replaceChildren(
        element("option", { value: "", textContent: "all" }), element("option", { value: -1, textContent: "embed" }),
        ...Array.from({ length: shape.layers }, (_, index) => element("option", { value: index, textContent: index })),
        element("option", { value: shape.layers, textContent: "output" }),
      );
      names.replaceChildren(...shape.nodes.map((name) => element("option", { value: name })));
      search.value = "";
      node = -1;
      number.max = list.count;
      fit();
      setCount(list.shown);
      slider.value = toPosition(k);
    }
    open(0);
  }

  return { show };
})();
