import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany } from "ai";

const { base, key = "none", model, texts, one = false } = JSON.parse(process.env.GIVEN);
const cde = createOpenAICompatible({ name: "cde", baseURL: base, apiKey: key });
try {
  const vectors = one
    ? await Promise.all(texts.map(async (value) => (await embed({ model: cde.embeddingModel(model), value })).embedding))
    : (await embedMany({ model: cde.embeddingModel(model), values: texts })).embeddings;
  console.log(JSON.stringify({ vectors }));
} catch (error) {
  const body = JSON.parse(error.responseBody ?? "{}");
  console.log(JSON.stringify({ error: error.name, status: error.statusCode, code: body.error?.code, message: error.message }));
}
