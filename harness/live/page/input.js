"use strict";
// Keys, mouse and fingers become one state: buttons held (a bit each, in the model's order) and the mouse's movement.
const CODES = {KeyW: "W", KeyA: "A", KeyS: "S", KeyD: "D", ShiftLeft: "LSHIFT", Space: "SPACE", KeyR: "R", KeyF: "F", KeyE: "E"};
const MOUSE_BUTTONS = {0: "LMB", 2: "RMB"};
const PAD_NAMES = {LMB: "Fire", SPACE: "Jump", E: "Use", LSHIFT: "Run", R: "R", F: "F", RMB: "Alt"};
const TURN = 2; // of the model's mouse unit, for every frame in which an arrow is held
const DRAG = 1.6; // a finger's movement against a mouse's

class Input {
  // send(buttons, dx, dy, t): called at once when buttons change, and once for each of the browser's own frames otherwise.
  constructor(stage, send) {
    this.stage = stage; this.send = send;
    this.names = []; this.held = new Set(); this.arrows = new Set();
    this.sensitivity = 0.15; this.moved = [0, 0]; this.movedAt = null; this.active = false;
    this.onchange = () => {};
    this.listen();
  }
  get buttons() { return this.names.reduce((bits, name, i) => bits | (this.held.has(name) ? 1 << i : 0), 0) >>> 0; }
  press(name, down, t) {
    if (!this.names.includes(name) || this.held.has(name) === down) return;
    down ? this.held.add(name) : this.held.delete(name);
    this.flush(t);
    this.onchange();
  }
  release() { this.held.clear(); this.arrows.clear(); this.moved = [0, 0]; this.movedAt = null; this.flush(performance.now()); this.onchange(); }
  move(dx, dy, t) {
    if (!this.active) return;
    this.moved[0] += dx * this.sensitivity; this.moved[1] += dy * this.sensitivity;
    if (this.movedAt === null) { this.movedAt = t; requestAnimationFrame(() => this.movedAt !== null && this.flush(this.movedAt)); }
  }
  flush(t) {
    const [dx, dy] = this.moved;
    this.moved = [0, 0]; this.movedAt = null;
    this.send(this.buttons, dx, dy, t);
  }
  // Called when a frame was drawn: a held arrow turns by so much in every frame.
  frame() {
    const turn = (this.arrows.has("ArrowRight") ? TURN : 0) - (this.arrows.has("ArrowLeft") ? TURN : 0);
    const tilt = (this.arrows.has("ArrowDown") ? TURN : 0) - (this.arrows.has("ArrowUp") ? TURN : 0);
    if (this.active && (turn || tilt)) { this.moved[0] += turn; this.moved[1] += tilt; this.flush(performance.now()); }
  }
  typing(event) { return event.target instanceof Element && event.target.closest("input, select, textarea") !== null; }
  listen() {
    addEventListener("keydown", event => {
      if (this.typing(event) || event.ctrlKey || event.metaKey || event.altKey || !this.active) return;
      if (event.code.startsWith("Arrow")) { event.preventDefault(); if (!this.arrows.has(event.code)) { this.arrows.add(event.code); this.frame(); } return; }
      if (!(event.code in CODES)) return;
      event.preventDefault();
      this.press(CODES[event.code], true, event.timeStamp);
    });
    addEventListener("keyup", event => {
      this.arrows.delete(event.code);
      if (event.code in CODES) this.press(CODES[event.code], false, event.timeStamp);
    });
    addEventListener("blur", () => this.release());
    let from = null; // where a drag was last, without pointer lock
    this.stage.addEventListener("pointerdown", event => {
      if (!this.active || event.target.closest("button")) return;
      if (event.pointerType === "mouse") this.press(MOUSE_BUTTONS[event.button], true, event.timeStamp);
      if (document.pointerLockElement !== this.stage) { from = [event.clientX, event.clientY]; this.stage.setPointerCapture(event.pointerId); }
    });
    this.stage.addEventListener("pointermove", event => {
      if (document.pointerLockElement === this.stage) {
        this.move(event.movementX, event.movementY, event.timeStamp);
      } else if (from) {
        const speed = event.pointerType === "mouse" ? 1 : DRAG;
        this.move((event.clientX - from[0]) * speed, (event.clientY - from[1]) * speed, event.timeStamp);
        from = [event.clientX, event.clientY];
      }
    });
    for (const end of ["pointerup", "pointercancel"]) addEventListener(end, event => {
      from = null;
      if (event.pointerType === "mouse") this.press(MOUSE_BUTTONS[event.button], false, event.timeStamp);
    });
    this.stage.addEventListener("contextmenu", event => event.preventDefault());
  }
}

// A stick for W, A, S, D and a pad for every other button.
function touchControls(input, stick, pads) {
  const knob = stick.firstElementChild;
  const steer = event => {
    const box = stick.getBoundingClientRect(), reach = box.width / 2;
    let x = (event.clientX - box.left) / reach - 1, y = (event.clientY - box.top) / reach - 1;
    const length = Math.hypot(x, y);
    if (length > 1) { x /= length; y /= length; }
    knob.style.transform = `translate(${x * 38}px, ${y * 38}px)`;
    for (const [name, on] of [["D", x > .35], ["A", x < -.35], ["S", y > .35], ["W", y < -.35]]) input.press(name, on, event.timeStamp);
  };
  stick.addEventListener("pointerdown", event => { stick.setPointerCapture(event.pointerId); steer(event); });
  stick.addEventListener("pointermove", event => { if (stick.hasPointerCapture(event.pointerId)) steer(event); });
  for (const end of ["pointerup", "pointercancel"]) stick.addEventListener(end, event => {
    knob.style.transform = "";
    for (const name of "WASD") input.press(name, false, event.timeStamp);
  });
  const shown = Object.keys(PAD_NAMES).filter(name => input.names.includes(name));
  pads.replaceChildren(...shown.map(name => {
    const pad = document.createElement("button");
    pad.type = "button"; pad.textContent = PAD_NAMES[name]; pad.dataset.button = name;
    const set = (down, event) => { pad.classList.toggle("down", down); input.press(name, down, event.timeStamp); };
    pad.addEventListener("pointerdown", event => { pad.setPointerCapture(event.pointerId); set(true, event); });
    for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, event => set(false, event));
    return pad;
  }));
}
