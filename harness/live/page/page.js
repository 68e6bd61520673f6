"use strict";
const $ = id => document.getElementById(id);
const REASONS = {
  start: "", player: "Paused", idle: "Paused: nobody played for a while", stalled: "Waiting for this browser to keep up",
  unstable: "The world came apart (NaN). Reset to go on", error: "Paused by an error", replayed: "Replayed. Play goes on from here",
};
const STRIP = 120;
const game = {ready: null, state: null, link: null, panes: new Map(), clips: [], seq: 0, measuredSeq: 0, waiting: null, drawing: false,
  latency: new Sample(400), gaps: new Sample(STRIP), lastDrawn: null, drawn: 0, skipped: 0, wantPlay: false, hiddenWhilePlaying: false, last: null};

const input = new Input($("stage"), (buttons, dx, dy, t) => {
  game.seq += 1;
  send({type: "input", seq: game.seq, t: Math.max(0, t), buttons, mouse: [clamp(dx), clamp(dy)]});
});
const clamp = x => Math.max(-1e4, Math.min(1e4, x));
const send = message => game.link && game.link.send(message);

// Connection.

function connect() {
  Object.assign(game, {ready: null, state: null, seq: 0, measuredSeq: 0, waiting: null});
  $("link").textContent = "connecting"; $("link").className = "pill";
  game.link = new Link({text: hear, frame: see, end: lost});
}

function hear(message) {
  if (message.type === "ready") greet(message);
  else if (message.type === "state") update(message);
  else if (message.type === "clips") listClips(message.clips);
  else if (message.type === "notice") notice(message);
}

function lost(event) {
  input.active = false;
  if (document.pointerLockElement) document.exitPointerLock();
  $("stage").classList.remove("playing");
  $("link").textContent = "not connected"; $("link").className = "pill bad";
  $("why").textContent = event.reason || (game.ready ? "The connection was lost." : "The server does not answer.");
  $("begin").textContent = "Connect again";
  game.link = null;
  for (const button of document.querySelectorAll("#transport button, .segments button, #restart")) button.disabled = true;
}

function greet(ready) {
  game.ready = ready;
  $("link").textContent = `connected · ${ready.device}`; $("link").className = "pill good";
  const labels = Object.values(ready.arms).map(arm => arm.label);
  $("model").textContent = labels.join(" and ") + (ready.random_weights ? " · random weights" : "");
  document.documentElement.style.setProperty("--ratio", `${ready.width} / ${ready.height}`);
  input.names = ready.buttons;
  touchControls(input, $("stick"), $("pads"));
  $("keys").replaceChildren(...ready.buttons.map(name => Object.assign(document.createElement("kbd"), {textContent: name, id: `key-${name}`})));
  $("arms").replaceChildren(...Object.entries(ready.arms).map(([name, arm]) => {
    const button = Object.assign(document.createElement("button"), {type: "button", textContent: arm.label, title: arm.path});
    button.dataset.arm = name; button.setAttribute("role", "radio");
    button.onclick = () => send({type: "arm", arm: name});
    return button;
  }));
  for (const button of document.querySelectorAll("#transport button, .segments button, #restart")) button.disabled = false;
  for (const button of $("views").children) button.disabled = Object.keys(ready.arms).length < 2 && button.dataset.view !== "one";
  if (!$("sens").dataset.touched) setSensitivity(ready.sensitivity);
  listClips(ready.clips);
  facts($("facts"), Object.entries(ready.arms).flatMap(([, arm]) => [
    [arm.label, arm.path + (arm.emulated ? " (emulated: its speed says nothing about MX)" : "")],
    ...(arm.emulated ? [["", arm.weights]] : []), ...(arm.kv !== "bf16" ? [["KV cache", arm.kv]] : []),
  ]).concat([["Frame", `${ready.width} × ${ready.height}`], ["Window", `${ready.window} frames`]]));
}

function update(state) {
  const before = game.state;
  game.state = state;
  $("stage").classList.toggle("playing", state.playing);
  $("pause").textContent = state.playing ? "Pause" : "Play";
  $("begin").textContent = state.reason === "start" ? "Play" : "Go on";
  $("why").textContent = state.reason ? REASONS[state.reason] ?? state.reason : "";
  $("once").disabled = state.playing;
  input.active = state.playing && !state.replaying;
  if (!input.active && input.held.size) input.release();
  if (!state.playing && document.pointerLockElement) document.exitPointerLock();
  $("record").classList.toggle("on", state.recording);
  $("record").lastElementChild.textContent = state.recording ? "Save" : "Record";
  for (const button of $("arms").children) button.setAttribute("aria-checked", button.dataset.arm === state.arm);
  for (const button of $("views").children) button.setAttribute("aria-checked", button.dataset.view === state.view);
  if (state.view === "one") $("psnr").textContent = "";
  $("limit").value = state.fps; $("limitvalue").textContent = state.fps;
  const codec = `${state.codec} ${state.quality}`;
  if (![...$("codec").options].some(o => o.value === codec)) $("codec").add(new Option(`${state.codec} ${state.quality}`, codec));
  $("codec").value = codec;
  if (!before || before.clip !== state.clip || before.seed !== state.seed) {
    if (state.clip) $("clip").value = state.clip;
    if (state.seed !== null) $("seed").value = state.seed;
    setStart(state.start);
  }
  if (!state.playing) { game.lastDrawn = null; }
}

// Frames.

function see(frame) {
  if (game.waiting) game.skipped += 1;
  game.waiting = frame;
  if (!game.drawing) draw();
}

async function draw() {
  game.drawing = true;
  while (game.waiting) {
    const frame = game.waiting;
    game.waiting = null;
    try {
      const pictures = await Promise.all(frame.panes.map(pane => createImageBitmap(pane.blob)));
      show(frame, pictures);
    } catch (error) {
      console.error("a frame could not be drawn", error);
    }
    send({type: "drawn", serial: frame.serial});
  }
  game.drawing = false;
}

function show(frame, pictures) {
  arrange(frame.panes.map(pane => pane.name), frame.arm);
  frame.panes.forEach((pane, i) => {
    const canvas = game.panes.get(pane.name).canvas, picture = pictures[i];
    if (canvas.width !== picture.width || canvas.height !== picture.height) Object.assign(canvas, {width: picture.width, height: picture.height});
    canvas.getContext("2d").drawImage(picture, 0, 0);
    picture.close();
  });
  const now = performance.now();
  if (frame.seq > game.measuredSeq && frame.t > 0) { game.latency.add(now - frame.t); game.measuredSeq = frame.seq; }
  if (game.state?.playing) {
    if (game.lastDrawn !== null) game.gaps.add(now - game.lastDrawn);
    game.lastDrawn = now;
  }
  game.drawn += 1; game.last = frame;
  input.frame();
  if (frame.psnr) $("psnr").textContent = `PSNR ${frame.psnr.now.toFixed(1)} dB, mean ${frame.psnr.mean.toFixed(1)}`;
  $("clock").textContent = `frame ${frame.frame}` + (frame.recorded || game.state?.recording ? ` · ${frame.recorded} recorded` : "");
}

function arrange(names, chosen) {
  const now = [...$("panes").children].map(pane => pane.dataset.name);
  if (now.join() !== names.join()) {
    game.panes.clear();
    $("panes").replaceChildren(...names.map(name => {
      const pane = document.createElement("div"), canvas = document.createElement("canvas"), label = document.createElement("b");
      pane.className = "pane"; pane.dataset.name = name;
      label.textContent = name === "difference" ? "difference × 8" : game.ready.arms[name].label;
      canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", label.textContent);
      pane.append(canvas, label);
      game.panes.set(name, {pane, canvas});
      return pane;
    }));
    $("panes").classList.toggle("many", names.length > 1);
  }
  for (const [name, {pane}] of game.panes) pane.classList.toggle("chosen", names.length > 1 && name === chosen);
}

// Read-outs, a few times a second: what is measured must not be slowed by showing it.

function readOut() {
  const frame = game.last;
  if (!frame) return;
  const ms = value => value === null ? "–" : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
  $("fps").textContent = game.state?.playing && frame.fps ? frame.fps.toFixed(1) : "–";
  $("p50").textContent = ms(game.latency.percentile(50));
  $("p99").textContent = ms(game.latency.percentile(99));
  const rows = Object.entries(frame.ms).flatMap(([arm, row]) => [[`${game.ready.arms[arm].label}: DiT, decoder`, `${row.dit.toFixed(1)}, ${row.decoder.toFixed(1)} ms`]]);
  rows.push(["Encode", ms(frame.encode)], ["A frame", `${(frame.bytes / 1024).toFixed(1)} KiB`], ["Dropped there, here", `${frame.dropped}, ${game.skipped}`],
    ["Memory of the server", `${(frame.rss / 2 ** 20).toFixed(0)} MiB`]);
  if (frame.gpu) rows.push(["of the GPU", `${(frame.gpu / 2 ** 20).toFixed(0)} MiB`]);
  facts($("times"), rows);
  strip();
}

function strip() {
  const canvas = $("strip"), scale = devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const width = Math.round(box.width * scale), height = Math.round(56 * scale);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(name);
  const goal = 1000 / (game.state?.fps ?? 35), most = Math.min(goal * 4, Math.max(goal * 2, ...game.gaps.values)) * 1.05, bar = width / STRIP;
  context.clearRect(0, 0, width, height);
  game.gaps.values.forEach((gap, i) => {
    const high = Math.min(height, Math.max(1, gap / most * height));
    context.fillStyle = gap > goal * 2 ? colour("--bad") : gap > goal * 1.35 ? colour("--open") : colour("--good");
    context.fillRect(width - (game.gaps.values.length - i) * bar, height - high, Math.max(1, bar - scale), high);
  });
  context.strokeStyle = colour("--soft"); context.setLineDash([4 * scale, 4 * scale]); context.lineWidth = scale;
  const y = height - goal / most * height;
  context.beginPath(); context.moveTo(0, y); context.lineTo(width, y); context.stroke();
  context.fillStyle = colour("--soft"); context.font = `${10 * scale}px system-ui`;
  context.fillText(`${goal.toFixed(0)} ms`, 3 * scale, y - 4 * scale);
}

function facts(list, rows) {
  list.replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), {textContent: name}), Object.assign(document.createElement("dd"), {textContent: value}));
    return row;
  }));
}

function notice(message) {
  const item = document.createElement("li"), text = Object.assign(document.createElement("span"), {textContent: message.text});
  item.className = message.level;
  const close = Object.assign(document.createElement("button"), {type: "button", className: "close", textContent: "✕", onclick: () => item.remove()});
  close.setAttribute("aria-label", "Dismiss");
  item.append(text, close);
  if (message.command) {
    item.append(Object.assign(document.createElement("code"), {textContent: message.command}));
    item.dataset.saved = message.saved;
  } else if (message.level === "info") setTimeout(() => item.remove(), 5000);
  $("notices").prepend(item);
  while ($("notices").children.length > 4) $("notices").lastElementChild.remove();
}

// World.

function listClips(clips) {
  game.clips = clips;
  const chosen = $("clip").value;
  const group = (label, list) => {
    const options = document.createElement("optgroup");
    options.label = label;
    options.append(...list.map(clip => new Option(`${clip.id.replace("played/", "").replaceAll("_", " ")}`, clip.id)));
    return options;
  };
  const own = clips.filter(clip => clip.own), given = clips.filter(clip => !clip.own);
  $("clip").replaceChildren(group("Clips", given), ...(own.length ? [group("Played", own)] : []));
  if (clips.some(clip => clip.id === chosen)) $("clip").value = chosen;
  setStart(0);
}

function setStart(value) {
  const clip = game.clips.find(clip => clip.id === $("clip").value);
  $("start").max = clip && game.ready ? Math.max(0, clip.frames - game.ready.window) : 0;
  $("start").value = value; $("startvalue").textContent = $("start").value;
  $("replay").hidden = !clip?.replayable;
}

function setSensitivity(value) {
  input.sensitivity = Number(value);
  $("sens").value = value; $("sensvalue").textContent = `× ${Number(value).toFixed(2)}`;
}

function reset() {
  const seed = $("seed").value === "" ? null : Math.max(0, Math.floor(Number($("seed").value)));
  send({type: "reset", clip: $("clip").value || null, start: Number($("start").value), seed: Number.isSafeInteger(seed) ? seed : null});
  game.latency.clear();
}

const resetToLast = () => { const s = game.state; if (s) send({type: "reset", clip: s.clip, start: s.start, seed: s.seed}); };

// Playing.

function play() {
  if (!game.link) { connect(); return; }
  send({type: "play"});
  $("stage").focus({preventScroll: true});
  if (!document.body.classList.contains("touching") && $("stage").requestPointerLock) {
    try { $("stage").requestPointerLock()?.catch?.(() => {}); } catch { /* drags look around then */ }
  }
}
const pause = () => send({type: "pause"});
const toggle = () => game.state?.playing ? pause() : play();
const record = () => game.state && send({type: "record", on: !game.state.recording});
const view = name => game.ready && Object.keys(game.ready.arms).length > 1 && send({type: "view", view: game.state.view === name ? "one" : name});
const arm = name => game.ready && name in game.ready.arms && send({type: "arm", arm: name});

$("begin").onclick = play;
$("pause").onclick = toggle;
$("once").onclick = () => send({type: "step"});
$("again").onclick = resetToLast;
$("record").onclick = record;
$("restart").onclick = reset;
$("replay").onclick = () => send({type: "replay", id: $("clip").value});
for (const button of $("views").children) button.onclick = () => send({type: "view", view: button.dataset.view});
$("clip").onchange = () => setStart(0);
$("start").oninput = () => { $("startvalue").textContent = $("start").value; };
$("limit").oninput = () => { $("limitvalue").textContent = $("limit").value; };
$("limit").onchange = () => { send({type: "limit", fps: Number($("limit").value)}); game.gaps.clear(); };
$("sens").oninput = () => { $("sens").dataset.touched = "yes"; setSensitivity($("sens").value); };
$("codec").onchange = () => { const [codec, quality] = $("codec").value.split(" "); send({type: "codec", codec, quality: Number(quality)}); };
$("smooth").onchange = () => $("panes").classList.toggle("sharp", !$("smooth").checked);
$("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("--bg").trim() === "#0e1116";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};
input.onchange = () => { for (const name of input.names) $(`key-${name}`)?.classList.toggle("down", input.held.has(name)); };

addEventListener("keydown", event => {
  if (input.typing(event) || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = {KeyP: toggle, KeyN: () => { if (!game.state?.playing) send({type: "step"}); }, KeyC: record, Digit1: () => arm("bf16"),
    Digit2: () => arm("candidate"), Digit3: () => view("split"), Digit4: () => view("difference"), Enter: resetToLast}[event.code];
  if (!act || (event.code === "Enter" && event.target instanceof HTMLButtonElement)) return;
  event.preventDefault();
  act();
});
document.addEventListener("pointerlockchange", () => {
  if (!document.pointerLockElement && game.state?.playing) pause(); // Esc
});
$("stage").addEventListener("click", event => {
  if (game.state?.playing && !document.pointerLockElement && event.detail === 1 && !document.body.classList.contains("touching") && !event.target.closest("button")) {
    try { $("stage").requestPointerLock?.()?.catch?.(() => {}); } catch { /* drags look around then */ }
  }
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && game.state?.playing) { game.hiddenWhilePlaying = true; pause(); }
  else if (!document.hidden && game.hiddenWhilePlaying) { game.hiddenWhilePlaying = false; send({type: "play"}); }
});
// Holding one key for long is playing too.
setInterval(() => { if (input.active && (input.held.size || input.arrows.size)) input.flush(performance.now()); }, 5000);
setInterval(readOut, 250);
const touching = () => document.body.classList.toggle("touching", matchMedia("(pointer: coarse)").matches);
matchMedia("(pointer: coarse)").addEventListener("change", touching);
touching();
connect();
