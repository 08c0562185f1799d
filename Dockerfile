# The server: docker build -t tieredkv . && docker run -p 127.0.0.1:8000:8000 -e TIEREDKV_API_KEY tieredkv
FROM python:3.13-slim

# cpu: a third of the size. For cards: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN useradd --create-home --uid 10001 tieredkv \
    && install -d -o tieredkv -g tieredkv /var/lib/tieredkv

WORKDIR /opt/tieredkv
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY tieredkv tieredkv
COPY benchmarks benchmarks
# torch's index need not have the constrained versions of what torch needs: those come with the second command.
RUN pip install --no-cache-dir --no-deps torch torchvision --index-url "$TORCH_INDEX" -c constraints.txt \
    && pip install --no-cache-dir ".[serve]" -c constraints.txt

USER tieredkv
WORKDIR /home/tieredkv
VOLUME /var/lib/tieredkv
EXPOSE 8000
ENV TIEREDKV_HOST=0.0.0.0 TIEREDKV_SESSIONS=/var/lib/tieredkv
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tieredkv", "serve"]
