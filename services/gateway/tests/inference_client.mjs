// node inference_client.mjs FILE.proto HOST:PORT AUTHORIZATION: asks a gateway by the Open Inference Protocol, and says what came.
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [file, address, authorization] = process.argv.slice(2);
const { inference } = grpc.loadPackageDefinition(loadSync(file, { keepCase: true, longs: Number }));
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("authorization", authorization);

const ask = (method, request, meta = new grpc.Metadata()) =>
  new Promise((resolve, reject) =>
    client[method](request, meta, { deadline: Date.now() + 20_000 }, (error, answer) => (error ? reject(error) : resolve(answer))));

const request = {
  model_name: "news",
  inputs: [{ name: "text", datatype: "BYTES", shape: [1], contents: { bytes_contents: [Buffer.from("a")] } }],
};
const { live } = await ask("ServerLive", {});
const answer = await ask("ModelInfer", request, metadata);
const refused = await ask("ModelInfer", request).catch((error) => [error.code, error.details]);
const labels = answer.outputs[0].contents.bytes_contents.map(String);
console.log(JSON.stringify({ live, labels, version: answer.model_version, refused }));
client.close();
