# Every image for every architecture:
#
#   docker buildx bake -f docker/docker-bake.hcl                              # build, and keep in the cache
#   REGISTRY=registry.example/fleet/ TAG=0.2.0 docker buildx bake -f docker/docker-bake.hcl --push

variable "REGISTRY" {
  default = ""
}

variable "TAG" {
  default = "dev"
}

# As python:3.11-slim-bookworm@sha256:... to build on one image for good (docker/README.md, 1).
variable "PYTHON_IMAGE" {
  default = "docker.io/library/python:3.11-slim-bookworm"
}

variable "JETPACK_TAG" {
  default = "25.02-py3-igpu"
}

group "default" {
  targets = ["aggregator", "worker", "worker-lite"]
}

target "image" {
  context   = "."
  platforms = ["linux/amd64", "linux/arm64"]
  labels = {
    "org.opencontainers.image.title"    = "fedgrpc"
    "org.opencontainers.image.licenses" = "Apache-2.0"
    "org.opencontainers.image.version"  = TAG
  }
}

target "aggregator" {
  inherits   = ["image"]
  dockerfile = "docker/aggregator.Dockerfile"
  tags       = ["${REGISTRY}fedgrpc-aggregator:${TAG}"]
  args       = { PYTHON_IMAGE = PYTHON_IMAGE }
}

target "worker" {
  inherits   = ["image"]
  dockerfile = "docker/worker.Dockerfile"
  tags       = ["${REGISTRY}fedgrpc-worker:${TAG}"]
  args       = { PYTHON_IMAGE = PYTHON_IMAGE }
}

target "worker-lite" {
  inherits   = ["image"]
  dockerfile = "docker/worker-lite.Dockerfile"
  tags       = ["${REGISTRY}fedgrpc-worker-lite:${TAG}"]
  args       = { PYTHON_IMAGE = PYTHON_IMAGE }
}

# Not in the default group: NVIDIA's base image is 10 GB, and for arm64 alone.
target "worker-jetson" {
  inherits   = ["image"]
  platforms  = ["linux/arm64"]
  dockerfile = "docker/worker-jetson.Dockerfile"
  tags       = ["${REGISTRY}fedgrpc-worker-jetson:${TAG}"]
  args       = { JETPACK_TAG = JETPACK_TAG }
}
