import { OpenAIEmbeddings } from "@langchain/openai";

const { base, key = "none", model, texts, one = false } = JSON.parse(process.env.GIVEN);
const client = new OpenAIEmbeddings({ model, apiKey: key, configuration: { baseURL: base } });
try {
  const vectors = one
    ? await Promise.all(texts.map((text) => client.embedQuery(text)))
    : await client.embedDocuments(texts);
  console.log(JSON.stringify({ vectors }));
} catch (error) {
  const { status, code } = error.cause ?? error;
  console.log(JSON.stringify({ error: error.constructor.name, status, code }));
}
