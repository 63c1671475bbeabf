/* Three sliders, K, learning rate and P, and the mean loss on a bowl that follows from them: the closed forms of
   fwdlib/sliders.py. Fills every element of the class "sliders"; needs no other file and asks for none. */
"use strict";
(() => {
  const secondMoment = (numParams, numTangents) => (numParams + numTangents + 1) / numTangents;
  const relativeError = (numParams, numTangents) => ((numParams + 1) / numTangents) ** 0.5;
  const largestRate = (moment) => 2 / moment;

  function meanLosses(numSteps, rate, moment) {
    const factor = 1 - 2 * rate + moment * rate ** 2;
    return Array.from({ length: numSteps + 1 }, (_, step) => factor ** step);
  }

  if (typeof document === "undefined") { // for the test, which runs this file without a page
    module.exports = { secondMoment, relativeError, largestRate, meanLosses };
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
    { name: "forward gradient", color: "#D55E00", dash: "8 4" },
  ];

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
    const paths = CURVES.map(({ color, dash }) =>
      draw("path", { fill: "none", stroke: color, "stroke-width": 2.5, "stroke-dasharray": dash }));
    const keys = CURVES.map(({ name, color, dash }, i) => draw("g", {},
      draw("line", { x1: WIDTH - 190, x2: WIDTH - 150, y1: 24 + 20 * i, y2: 24 + 20 * i, stroke: color, "stroke-width": 2.5, "stroke-dasharray": dash }),
      draw("text", { x: WIDTH - 142, y: 28 + 20 * i, fill: "currentColor", "font-size": 13 }, name)));
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
      [1, moment].forEach((m, i) => paths[i].setAttribute("d", pathOf(meanLosses(STEPS, values.rate, m))));
      const verdict = values.rate < largestRate(moment) ? "falls" : "grows";
      said.textContent = `The mean loss of the forward gradient ${verdict}. An estimate is off by ` +
        `${digits(relativeError(values.numParams, values.numTangents))} times the gradient; its largest learning rate is ` +
        `${digits(largestRate(moment))}, backprop's is 2.`;
      picture.setAttribute("aria-label", `Mean loss over ${STEPS} steps on a logarithmic axis, from 1. ${said.textContent}`);
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
