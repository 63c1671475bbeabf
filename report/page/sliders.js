/* Three sliders, K, learning rate and P, and what follows from them on a bowl, the mean loss and three runs: the formulas
   of fwdlib/sliders.py. Fills every element of the class "sliders"; needs no other file and asks for none. */
"use strict";
(() => {
  const secondMoment = (numParams, numTangents) => (numParams + numTangents + 1) / numTangents;
  const relativeError = (numParams, numTangents) => ((numParams + 1) / numTangents) ** 0.5;
  const largestRate = (moment) => 2 / moment;

  function meanLosses(numSteps, rate, moment) {
    const factor = 1 - 2 * rate + moment * rate ** 2;
    return Array.from({ length: numSteps + 1 }, (_, step) => factor ** step);
  }

  function* normals(seed) {
    const modulus = 2 ** 31 - 1;
    let state = 1000 * seed + 1;
    for (;;) {
      state = (state * 48271) % modulus; // below 2^53
      const radius = (-2 * Math.log(state / modulus)) ** 0.5;
      state = (state * 48271) % modulus;
      const angle = (2 * Math.PI * state) / modulus;
      yield radius * Math.cos(angle);
      yield radius * Math.sin(angle);
    }
  }

  function chiSquare(degrees, normal) {
    if (degrees < 2) return degrees * normal ** 2;
    const width = 2 / (9 * degrees);
    return degrees * Math.max(0, 1 - width + normal * width ** 0.5) ** 3;
  }

  function runLosses(numSteps, rate, numParams, numTangents, seed) {
    const [losses, draws] = [[1], normals(seed)];
    for (let step = 0; step < numSteps; step += 1) {
      const along = chiSquare(numTangents, draws.next().value) / numTangents;
      const across = (along * chiSquare(numParams - 1, draws.next().value)) / numTangents;
      losses.push(losses[step] * ((1 - rate * along) ** 2 + rate ** 2 * across));
    }
    return losses;
  }

  if (typeof document === "undefined") { // for the test, which runs this file without a page
    module.exports = { secondMoment, relativeError, largestRate, meanLosses, runLosses };
    return;
  }

  const [WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, STEPS] = [640, 280, 60, 24, 44, 200];
  const [FLOOR, TOP] = [-4, 4]; // powers of ten, of the vertical axis
  const SLIDERS = [
    { name: "numTangents", text: "tangents K", min: 0, max: 3, step: 0.1, start: 1, whole: true },
    { name: "rate", text: "learning rate, times the curvature", min: -6, max: 0.4, step: 0.05, start: 0.01 },
    { name: "numParams", text: "parameters P", min: 0, max: 6, step: 0.1, start: 100, whole: true },
  ];
  const CURVES = [
    { name: "backprop", color: "#0072B2", dash: "" },
    { name: "forward gradient, mean", color: "#D55E00", dash: "8 4" },
    { name: "three runs of it", color: "#D55E00", dash: "", thin: true },
  ];
  const SEEDS = [1, 2, 3];

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function draw(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  const digits = (value) => Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
  const across = (step) => LEFT + (step / STEPS) * (WIDTH - LEFT - RIGHT);
  const down = (power) => 10 + ((TOP - power) / (TOP - FLOOR)) * (HEIGHT - BOTTOM - 10);

  function pathOf(losses) {
    const powers = losses.map((loss) => Math.min(TOP, Math.max(FLOOR, Math.log10(loss)))); // log10(0) is -Infinity
    return powers.map((power, step) => `${step ? "L" : "M"}${across(step)} ${down(power)}`).join("");
  }

  function axes() {
    const parts = [];
    for (let power = FLOOR; power <= TOP; power += 2) {
      parts.push(draw("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: down(power), y2: down(power), opacity: 0.3 }));
      parts.push(draw("text", { x: LEFT - 8, y: down(power) + 4, "text-anchor": "end" }, String(10 ** power)));
    }
    for (const step of [0, STEPS / 2, STEPS]) {
      parts.push(draw("text", { x: across(step), y: HEIGHT - 22, "text-anchor": "middle" }, String(step)));
    }
    parts.push(draw("text", { x: across(STEPS / 2), y: HEIGHT - 4, "text-anchor": "middle" }, "steps"));
    return draw("g", { stroke: "none", fill: "currentColor", "font-size": 12 }, ...parts.filter((p) => p.tagName === "text"),
      draw("g", { stroke: "currentColor" }, ...parts.filter((p) => p.tagName === "line")));
  }

  function build(box, number) {
    const inputs = {};
    const rows = SLIDERS.map((slider) => {
      const id = `slider-${number}-${slider.name}`;
      const { min, max, step } = slider;
      const input = make("input", { type: "range", id, min, max, step });
      input.value = Math.log10(slider.start);
      const output = make("output", {});
      output.setAttribute("for", id);
      inputs[slider.name] = { input, output, slider };
      return make("p", {}, make("label", { htmlFor: id }, slider.text), " ", output, make("br", {}), input);
    });
    const lineOf = ({ color, dash, thin }) =>
      ({ fill: "none", stroke: color, "stroke-dasharray": dash, "stroke-width": thin ? 1 : 2.5, opacity: thin ? 0.7 : 1 });
    const paths = [...CURVES.slice(0, 2), ...SEEDS.map(() => CURVES[2])].map((curve) => draw("path", lineOf(curve)));
    const keys = CURVES.map((curve, i) => draw("g", {},
      draw("line", { x1: WIDTH - 220, x2: WIDTH - 180, y1: 24 + 20 * i, y2: 24 + 20 * i, ...lineOf(curve) }),
      draw("text", { x: WIDTH - 172, y: 28 + 20 * i, fill: "currentColor", "font-size": 13 }, curve.name)));
    const picture = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" }, axes(), ...paths, ...keys);
    const said = make("p", {});
    said.setAttribute("role", "status");

    function follow() {
      const values = {};
      for (const [name, { input, output, slider }] of Object.entries(inputs)) {
        values[name] = slider.whole ? Math.round(10 ** Number(input.value)) : 10 ** Number(input.value);
        output.textContent = digits(values[name]);
        input.setAttribute("aria-valuetext", output.textContent);
      }
      const moment = secondMoment(values.numParams, values.numTangents);
      const { rate, numParams, numTangents } = values;
      const curves = [1, moment].map((m) => meanLosses(STEPS, rate, m));
      curves.push(...SEEDS.map((seed) => runLosses(STEPS, rate, numParams, numTangents, seed)));
      curves.forEach((losses, i) => paths[i].setAttribute("d", pathOf(losses)));
      const verdict = values.rate < largestRate(moment) ? "falls" : "grows";
      said.textContent = `The mean loss of the forward gradient ${verdict}. An estimate is off by ` +
        `${digits(relativeError(values.numParams, values.numTangents))} times the gradient; its largest learning rate is ` +
        `${digits(largestRate(moment))}, backprop's is 2.`;
      picture.setAttribute("aria-label", `Mean loss and three runs over ${STEPS} steps on a logarithmic axis, from 1. ${said.textContent}`);
    }

    for (const { input } of Object.values(inputs)) input.addEventListener("input", follow);
    box.replaceChildren(...rows, picture, said);
    follow();
  }

  function start() {
    document.querySelectorAll(".sliders").forEach(build);
  }
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
