"""What answers: transformers, vLLM in this process, or a server with OpenAI's protocol."""
