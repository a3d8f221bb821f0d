// The page's own elements: a viewer of tiled pictures, and settings in the address.
(() => {
  // <lf-viewer src width height tile levels>: drag, wheel, pinch, + - 0 and arrows. Only tiles in sight are in the page.
  class Viewer extends HTMLElement {
    connectedCallback() {
      if (this.stage) return;
      const number = (name) => Number(this.getAttribute(name));
      [this.w, this.h, this.tile, this.levels] = ["width", "height", "tile", "levels"].map(number);
      const root = (window.gradio_config && window.gradio_config.root) || "";
      this.base = `${root}/gradio_api/file=${this.getAttribute("src")}`;
      this.setAttribute("role", "img");
      this.setAttribute("aria-label", `${this.getAttribute("label")}, ${this.w} by ${this.h} pixels. Plus and minus zoom, arrows move.`);
      this.stage = document.createElement("div");
      const bar = document.createElement("div");
      bar.className = "lf-zoom";
      for (const [text, title, act] of [
        ["\u2212", "Zoom out", () => this.zoom(0.5)],
        ["+", "Zoom in", () => this.zoom(2)],
        ["Fit", "Whole picture", () => this.fit()],
        ["1:1", "One pixel a pixel", () => this.zoom(1 / this.scale)],
      ]) {
        const button = document.createElement("button");
        Object.assign(button, { type: "button", textContent: text, title, onclick: act });
        button.setAttribute("aria-label", title);
        bar.append(button);
      }
      this.append(this.stage, bar);
      this.tiles = new Map();
      this.fingers = new Map();
      this.addEventListener("wheel", (e) => { e.preventDefault(); this.zoom(Math.exp(-e.deltaY / 300), e.clientX, e.clientY); }, { passive: false });
      this.addEventListener("pointerdown", (e) => {
        if (e.target.closest("button")) return;
        this.setPointerCapture(e.pointerId);
        this.fingers.set(e.pointerId, e);
      });
      this.addEventListener("pointermove", (e) => this.drag(e));
      for (const end of ["pointerup", "pointercancel"]) this.addEventListener(end, (e) => this.fingers.delete(e.pointerId));
      this.addEventListener("keydown", (e) => {
        const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[e.key];
        if (step) this.move(...step);
        else if (e.key === "+" || e.key === "=") this.zoom(2);
        else if (e.key === "-") this.zoom(0.5);
        else if (e.key === "0") this.fit();
        else return;
        e.preventDefault();
      });
      this.observer = new ResizeObserver(() => this.fit());
      this.observer.observe(this);
    }

    disconnectedCallback() { this.observer && this.observer.disconnect(); }

    fit() {
      const { clientWidth: w, clientHeight: h } = this;
      if (!w || !h) return;
      this.least = Math.min(w / this.w, h / this.h);
      this.scale = Math.min(this.least, 4);
      [this.x, this.y] = [(w - this.w * this.scale) / 2, (h - this.h * this.scale) / 2];
      this.draw();
    }

    zoom(by, clientX, clientY) {
      const box = this.getBoundingClientRect();
      const x = clientX === undefined ? box.width / 2 : clientX - box.left;
      const y = clientY === undefined ? box.height / 2 : clientY - box.top;
      const scale = Math.min(Math.max(this.scale * by, Math.min(this.least, 1)), 8);
      this.x = x - ((x - this.x) * scale) / this.scale;
      this.y = y - ((y - this.y) * scale) / this.scale;
      this.scale = scale;
      this.draw();
    }

    move(dx, dy) { this.x += dx; this.y += dy; this.draw(); }

    drag(e) {
      const before = this.fingers.get(e.pointerId);
      if (!before) return;
      const others = [...this.fingers.values()].filter((f) => f.pointerId !== e.pointerId);
      if (others.length) {
        const far = (f) => Math.hypot(f.clientX - others[0].clientX, f.clientY - others[0].clientY) || 1;
        this.zoom(far(e) / far(before), others[0].clientX, others[0].clientY);
      } else this.move(e.clientX - before.clientX, e.clientY - before.clientY);
      this.fingers.set(e.pointerId, e);
    }

    draw() {
      if (this.waiting) return;
      this.waiting = requestAnimationFrame(() => { this.waiting = 0; this.place(); });
    }

    place() {
      // the smallest level that has a pixel for each of the screen's, and the first one below it, to show meanwhile
      const sharp = this.scale * (window.devicePixelRatio || 1);
      let level = this.levels - 1;
      while (level > 0 && sharp <= 0.5 ** (this.levels - level)) level--;
      const wanted = new Map();
      for (const l of new Set([0, level])) {
        const side = this.tile * 2 ** (this.levels - 1 - l);
        const first = (at) => Math.max(0, Math.floor(-at / this.scale / side));
        const last = (at, room, size) => Math.min(Math.ceil(size / side), Math.ceil((room - at) / this.scale / side));
        for (let row = first(this.y); row < last(this.y, this.clientHeight, this.h); row++)
          for (let column = first(this.x); column < last(this.x, this.clientWidth, this.w); column++)
            wanted.set(`${l}-${column}-${row}`, [l, column * side, row * side, side]);
      }
      for (const [name, image] of this.tiles) if (!wanted.has(name)) { image.remove(); this.tiles.delete(name); }
      for (const [name, [l, left, top, side]] of wanted) {
        let image = this.tiles.get(name);
        if (!image) {
          image = new Image();
          Object.assign(image, { src: `${this.base}/${name}.jpg`, draggable: false, alt: "", decoding: "async" });
          image.style.zIndex = l;
          this.tiles.set(name, image);
          this.stage.append(image);
        }
        const width = Math.min(side, this.w - left), height = Math.min(side, this.h - top);
        Object.assign(image.style, {
          left: `${this.x + left * this.scale}px`, top: `${this.y + top * this.scale}px`,
          width: `${width * this.scale + 0.5}px`, height: `${height * this.scale + 0.5}px`,
          imageRendering: sharp > 2 ? "pixelated" : "auto",
        });
      }
    }
  }
  if (!customElements.get("lf-viewer")) customElements.define("lf-viewer", Viewer);

  window.linfusion = {
    // keep the settings in the address, so that it can be passed on
    share(names, values) {
      const query = new URLSearchParams(location.search);
      names.forEach((name, i) => { if (values[i] !== null && values[i] !== undefined && values[i] !== "") query.set(name, values[i]); });
      history.replaceState(null, "", `${location.pathname}?${query}`);
    },
  };
})();
