// The studio's addresses. A refusal is a Refused with its sentence; no answer at all is a Lost.

export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export class Lost extends Error {}

const OWN = { "X-Studio": "1" };
const SESSION = (name) => `sessions/${encodeURIComponent(name)}`;

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...OWN, ...options.headers } });
  } catch {
    throw new Lost("the studio does not answer");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  throw new Refused(error.message ?? body.detail ?? `refused (${response.status})`, response.status, error.code);
}

const json = async (path, options) => (await ask(path, options)).json();

export const model = () => json("model");
export const sessions = () => json("sessions");
export const newSession = () => json("sessions", { method: "POST" });
export const session = (name) => json(SESSION(name));
export const takeIn = (file) => json("import", { method: "POST", body: file });
export const upload = (file) => json("pictures", { method: "POST", body: file });
export const stop = (name) => ask(`${SESSION(name)}/stop`, { method: "POST", keepalive: true });
export const exportAddress = (name, form) => `${SESSION(name)}/export/${form}`;
export const lookedAddress = (name) => `${SESSION(name)}/looked`;
export const health = () => ask("health");

export const act = (name, revision, action, fields) =>
  json(SESSION(name), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ revision, action, fields }),
  });

// What the model does, message by message, through Gradio's queue.
export async function* generate(name, revision, request) {
  const address = "gradio/gradio_api/call/generate";
  const { event_id: id } = await json(address, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ data: [name, revision, request] }),
  });
  const response = await ask(`${address}/${id}`);
  for await (const { event, data } of events(response.body)) {
    if (event === "complete") return;
    if (event === "error") throw new Refused("the studio failed; its log has more", 500, "internal");
    if (event === "generating") yield data[0];
  }
  throw new Lost("the studio does not answer");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read().catch(() => {
        throw new Lost("the studio does not answer");
      });
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s).slice(0, 2)));
        yield { event: lines.event, data: lines.data ? JSON.parse(lines.data) : null };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
