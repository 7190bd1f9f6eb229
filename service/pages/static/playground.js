// Before LangServe's own script: mends what its playgrounds get wrong.
(() => {
  const fetchAsBefore = window.fetch;
  let inputName = Promise.resolve();

  // Of a request that failed the form shows nothing, and the chat "network error": this says what the service said.
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
  const explain = (text, status) => {
    try {
      show(JSON.parse(text).error.message);
    } catch {
      show(`The service refused this with status ${status}.`);
    }
  };
  const listen = async (response) => {
    const decoder = new TextDecoder();
    const reader = response.body.getReader();
    let text = "";
    try {
      for (let chunk; !(chunk = await reader.read()).done; ) {
        text += decoder.decode(chunk.value, {stream: true});
        if (!text.includes("event: error")) text = text.slice(-16);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      show("The answer broke off. The log of the service says why.");
    }
    const event = /event: error\r\ndata: (.*)/.exec(text);
    if (event) explain(event[1]);
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
      // LangServe's script cancels what is no stream: so read a refusal before it sees it.
      response.ok ? listen(response.clone()) : explain(await response.clone().text(), response.status);
      return response;
    } catch (error) {
      if (error.name !== "AbortError") show("The service cannot be reached.");
      throw error;
    }
  };
})();
