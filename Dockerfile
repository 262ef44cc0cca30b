FROM python:3.13-slim-trixie

# TMPDIR: where workers share metrics; it can be written on a read-only root, too.
ENV HOST=0.0.0.0 \
    WALLET_DATA_DIR=/data \
    TMPDIR=/dev/shm \
    PYTHONUNBUFFERED=1

WORKDIR /srv/wallet

COPY requirements.txt .
RUN pip install --no-cache-dir --root-user-action=ignore -r requirements.txt \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin wallet \
    && install -d -o wallet -g wallet -m 700 /data

COPY dbmate.env .
COPY db db
COPY app app
RUN ln -s "$(python -c 'from app.server.embedded import BINARIES; print(BINARIES)')/psql" /usr/local/bin/psql

USER 10001:10001

EXPOSE 8000

# Without a proxy: one that is configured for containers knows nothing about this container's 127.0.0.1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from os import environ; from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open(f\"http://127.0.0.1:{environ.get('PORT') or 8000}/healthz\", timeout=4)"]

CMD ["python", "-m", "app"]
