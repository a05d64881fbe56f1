# An image of one member, or of what a family of members shares: PARENT with more packages in a folder of their own, which
# runner.Dockerfile has put on Python's path. build.py builds all of them, from contexts that hold this file and `wheels/`, which
# has exactly what PARENT lacks.
ARG PARENT=kernelm-python
FROM ${PARENT} AS build
ARG LAYER=member
USER 0:0
COPY wheels /wheels
# compiled by pip, which passes over what is meant for a newer Python
RUN python -m pip install --quiet --no-index --no-deps --no-cache-dir --compile --target "/opt/kernelm/${LAYER}" /wheels/*.whl

FROM ${PARENT}
ARG LAYER=member
COPY --from=build /opt/kernelm/${LAYER} /opt/kernelm/${LAYER}
ENV PATH=/opt/kernelm/${LAYER}/bin:/opt/kernelm/bin:/usr/local/bin:/usr/bin:/bin
