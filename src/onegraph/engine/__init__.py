"""The engine: requests in, tokens out. Request, scheduler, KV blocks, runner, sampler, one class a file."""
