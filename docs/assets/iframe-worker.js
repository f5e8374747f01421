// Browsers start no worker for pages that are opened from a folder: there, the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inner = this.frame.contentWindow
      const script = (src) =>
        new Promise((done) => {
          const tag = inner.document.createElement("script")
          tag.src = src
          tag.onload = done
          inner.document.body.append(tag)
        })
      inner.importScripts = async (...sources) => {
        for (const source of sources) await script(source)
      }
      // What the search says goes to the page, and not to the frame itself.
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      script(url).then(() => {
        this.ready = true
        for (const data of this.waiting.splice(0)) this.postMessage(data)
      })
    }

    postMessage(data) {
      if (this.ready) this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
