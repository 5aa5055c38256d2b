"""The policy: a model adapter inside one `nn.Module`, batches that share prefixes, chunked log-probs, sampling."""
