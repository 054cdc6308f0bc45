// One question on standard input, one answer on standard output, both JSON: what the official
// CloudEvents SDK for JavaScript makes of an event ("write") or of an MQTT message ("read").
const { CloudEvent, MQTT } = require("cloudevents");

const question = JSON.parse(require("fs").readFileSync(0, "utf8"));

function write({ event, mode }) {
  const message = MQTT[mode](new CloudEvent(event));
  const body = message.payload;
  const bytes = typeof body === "object" && !ArrayBuffer.isView(body) ? JSON.stringify(body) : body;
  return {
    contentType: message.PUBLISH["Content Type"],
    userProperties: message["User Properties"],
    payload: Buffer.from(bytes).toString("base64"),
  };
}

function read({ contentType, userProperties, payload }) {
  const body = Buffer.from(payload, "base64").toString("utf8");
  const message = {
    PUBLISH: { "Content Type": contentType },
    "User Properties": userProperties,
    headers: userProperties,
    payload: body,
    body,
  };
  return { isEvent: MQTT.isEvent(message), event: MQTT.toEvent(message).toJSON() };
}

process.stdout.write(JSON.stringify(question.op === "write" ? write(question) : read(question)));
