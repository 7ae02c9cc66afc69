"""gRPC plumbing shared by both sides: status codes, channels, servers, retries."""
