# Weir's image where there is Docker (or podman, or buildah): docker build -t weir .
# Without any of them: make image (docs/cluster.md).
FROM python:3.12-slim AS build
RUN apt-get update \
	&& apt-get install -y --no-install-recommends clang gcc libc6-dev llvm libbpf-dev linux-libc-dev make \
	&& rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make -B bpf hold \
	&& python -m venv /tmp/build \
	&& python -m image.locked > /tmp/requirements.txt \
	&& /tmp/build/bin/pip install --no-cache-dir --require-hashes -r /tmp/requirements.txt \
	&& /tmp/build/bin/pip install --no-cache-dir "hatchling>=1.27" "mypy[mypyc]>=1.13" \
	&& WEIR_COMPILE=1 /tmp/build/bin/python -m hatchling build -t wheel -d /tmp/dist \
	&& python -m venv --without-pip /opt/weir \
	&& /tmp/build/bin/pip --python /opt/weir/bin/python install --no-cache-dir --no-compile --no-deps \
		--only-binary=:all: --require-hashes -r /tmp/requirements.txt \
	&& /tmp/build/bin/pip --python /opt/weir/bin/python install --no-cache-dir --no-compile --no-deps \
		/tmp/dist/*.whl \
	&& python -m compileall -q --invalidation-mode unchecked-hash /opt/weir/lib

FROM python:3.12-slim AS sidecar
COPY --from=build /opt/weir /opt/weir
# compiled already, and a pod's root is read-only
ENV PATH=/opt/weir/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# a number: the kubelet cannot tell whether a name is root
USER 65532
ENTRYPOINT ["/opt/weir/bin/weir"]
CMD ["sidecar"]

# docker build --target hold -t weir-hold .: for nodes with an agent (docs/hold.md)
FROM sidecar AS hold
COPY --from=build /src/hold/weir-hold /opt/weir/bin/weir-hold
ENTRYPOINT ["/opt/weir/bin/weir-hold", "/opt/weir/bin/weir"]
CMD ["sidecar"]

FROM sidecar
