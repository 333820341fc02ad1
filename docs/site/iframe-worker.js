// Search runs in a Web Worker, which browsers refuse to pages that are opened as files. There an iframe takes its place:
// the worker's script runs in the iframe's window, and messages go through the page. Over http nothing changes.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const address = new URL(url, location.href).href
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.width = this.frame.height = 0
      document.body.appendChild(this.frame)
      const inner = this.frame.contentWindow
      inner.document.open()
      inner.document.write("<!doctype html><html><body></body></html>")
      inner.document.close()
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      // As in a worker, scripts that the worker asks for are there before it goes on; `import` may wait for a promise.
      inner.importScripts = (...urls) => urls.reduce(
        (before, each) => before.then(() => this.load(new URL(each, address).href)), Promise.resolve())
      this.ready = this.load(address)
    }
    load(address) {
      return new Promise((resolve, reject) => {
        const script = this.frame.contentDocument.createElement("script")
        script.src = address
        script.onload = resolve
        script.onerror = reject
        this.frame.contentDocument.body.appendChild(script)
      })
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
        .catch(error => this.dispatchEvent(new ErrorEvent("error", { error })))
    }
    set onmessage(handler) { this.addEventListener("message", handler) }
    terminate() { this.frame.remove() }
  }
}
