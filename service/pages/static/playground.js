// Before LangServe's own script: mends what its playgrounds get wrong.
(() => {
  const fetchAsBefore = window.fetch;
  let inputName = Promise.resolve();

  // Of a request that failed the form shows nothing, and the chat a toast for a moment: this shows the service's message.
  const hide = () => document.getElementById("failure")?.remove();
  const show = (text) => {
    hide();
    const box = document.body.appendChild(document.createElement("div"));
    box.id = "failure";
    box.role = "alert";
    box.textContent = text;
    box.title = "Click to close";
    box.onclick = hide;
  };
  const messageOf = (text, status) => {
    try {
      return JSON.parse(text).error.message;
    } catch {
      return `The service refused this with status ${status}.`;
    }
  };
  // The same response, but a stream with an error event fails when all of it was read: LangServe's scripts skip that event.
  const failing = (response) => {
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let text = "";
    let failure;
    const body = new ReadableStream({
      async pull(controller) {
        try {
          const {done, value} = await reader.read();
          if (done && failure) throw failure;
          if (done) return controller.close();
          text += decoder.decode(value, {stream: true});
          const event = /event: error\r\ndata: (.*)\r\n/.exec(text);
          if (event) failure ??= new Error(messageOf(event[1], response.status));
          const begin = text.lastIndexOf("event: error\r\n");
          text = text.slice(begin < 0 ? -16 : begin);
          controller.enqueue(value);
        } catch (error) {
          if (failure) show(failure.message);
          else if (error.name !== "AbortError") show("The answer broke off. The log of the service says why.");
          throw failure ?? error;
        }
      },
      cancel: (reason) => reader.cancel(reason),
    }, {highWaterMark: 0});  // a stream that fails throws away what waits in it
    return new Response(body, response);
  };

  // The chat takes its first message before it has read what its input is called, and then calls it "undefined".
  const readName = async (response) => {
    const {properties} = await response.json();
    return Object.keys(properties).find((name) => properties[name].type === "array");
  };
  const named = async (body) => {
    const {input, ...rest} = JSON.parse(body);
    if (!("undefined" in input)) return body;
    return JSON.stringify({input: {[await inputName]: input.undefined}, ...rest});
  };

  window.fetch = async (resource, options) => {
    const url = String(resource);
    if (url.endsWith("/input_schema")) {
      const response = fetchAsBefore(resource, options);
      inputName = response.then((response) => readName(response.clone())).catch(() => "undefined");
      return response;
    }
    if (!url.endsWith("/stream_log")) return fetchAsBefore(resource, options);
    hide();
    try {
      const response = await fetchAsBefore(resource, {...options, body: await named(options.body)});
      if (response.ok) return failing(response);
      // LangServe's script cancels what is no stream: so read a refusal before it sees it.
      show(messageOf(await response.clone().text(), response.status));
      return response;
    } catch (error) {
      if (error.name !== "AbortError") show("The service cannot be reached.");
      throw error;
    }
  };
})();
