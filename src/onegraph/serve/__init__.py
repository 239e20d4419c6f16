"""The server: OpenAI's API over HTTP, on the engine's thread. Needs the extra `serve`."""
