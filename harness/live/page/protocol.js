"use strict";
// The protocol of docs/play.md, version 1.
const PROTOCOL = 1, FRAME = 1;

function unpackFrame(buffer) {
  const view = new DataView(buffer);
  if (view.getUint8(0) !== PROTOCOL || view.getUint8(1) !== FRAME) throw new Error("a frame of another protocol");
  const size = view.getUint16(2, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  let at = 4 + size;
  for (const pane of header.panes) {
    pane.blob = new Blob([new Uint8Array(buffer, at, pane.bytes)], {type: pane.type});
    at += pane.bytes;
  }
  header.bytes = buffer.byteLength;
  return header;
}

// Talks to the server: `on.text(message)`, `on.frame(header)`, `on.end(event)`.
class Link {
  constructor(on) {
    const url = new URL("play", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.search = location.search;
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.send({type: "hello", protocol: PROTOCOL});
    this.socket.onmessage = ({data}) => typeof data === "string" ? on.text(JSON.parse(data)) : on.frame(unpackFrame(data));
    this.socket.onclose = on.end;
  }
  get open() { return this.socket.readyState === WebSocket.OPEN; }
  send(message) { if (this.open) this.socket.send(JSON.stringify(message)); }
}

// The last `most` numbers, and their percentiles.
class Sample {
  constructor(most) { this.most = most; this.values = []; }
  add(value) { this.values.push(value); if (this.values.length > this.most) this.values.shift(); }
  clear() { this.values = []; }
  percentile(p) {
    if (!this.values.length) return null;
    const sorted = [...this.values].sort((a, b) => a - b);
    return sorted[Math.min(sorted.length - 1, Math.floor(p / 100 * sorted.length))];
  }
}
