"""Contextual document embeddings behind OpenAI's embeddings API."""
