# The image that any plugin in Python can run in: kernelm-sdk, kernelm-contracts and what they need. deploy/images/docker.sh
# builds it, from a context that holds this file and `wheels/`.
ARG BASE=python:3.11-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7

FROM ${BASE} AS build
COPY wheels /wheels
# kernelm.pth: where member.Dockerfile adds to it
RUN python3 -m venv /opt/kernelm && /opt/kernelm/bin/python -m pip install --quiet --no-index --no-cache-dir --no-compile /wheels/*.whl \
 && /opt/kernelm/bin/python -m compileall -q /opt/kernelm/lib \
 && printf '/opt/kernelm/member\n/opt/kernelm/family\n' >"$(/opt/kernelm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kernelm.pth"

FROM ${BASE}
COPY --from=build /opt/kernelm /opt/kernelm
ENV PATH=/opt/kernelm/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# the node gives the user, the same as here or its own; a user of the image's own would be a name more to keep in step
USER 64321:64321
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "kernelm_sdk.runner"]
