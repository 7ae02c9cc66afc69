"""gRPC plumbing shared by both sides: status codes, proto conversion, channels, servers, retries."""
