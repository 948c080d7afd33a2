import OpenAI from "openai";

const { base, key = "none", model, texts, options = {} } = JSON.parse(process.env.GIVEN);
const client = new OpenAI({ baseURL: base, apiKey: key });
try {
  const answer = await client.embeddings.create({ model, input: texts, ...options });
  console.log(JSON.stringify({ vectors: answer.data.map((item) => item.embedding) }));
} catch (error) {
  console.log(JSON.stringify({ error: error.constructor.name, status: error.status, code: error.code }));
}
