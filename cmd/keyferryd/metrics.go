package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

const metricsPath = "/metrics"

// metrics are what Prometheus is told. Every label is of a bounded set: actions
// and codes of the API, algorithms, names of methods. No KeyId, access key or
// other name that a caller chooses is among them.
type metrics struct {
	registry *prometheus.Registry

	requests *prometheus.HistogramVec // seconds, by action and code
	imports  *prometheus.CounterVec   // by algorithm and result
	cache    *prometheus.CounterVec   // by result
	warnings prometheus.Counter
	swept    *prometheus.CounterVec // by what
	sweeps   *prometheus.CounterVec // by result
	sweptAt  prometheus.Gauge       // Unix time
	store    *prometheus.HistogramVec
	failures *prometheus.CounterVec
}

// latency are the bounds of histograms in seconds: a use of a cached key takes
// less than the first, a refused import a tenth of a second or its multiple.
var latency = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .15, .25, .5, 1, 2.5, 10, 30}

func newMetrics() *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyferry_" + name, Help: help}, labels)
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyferry_request_seconds", Buckets: latency,
			Help: "Requests and the time until they were answered, by action (empty: none of ours) and code.",
		}, []string{"action", "code"}),
		imports:  counter("imports_total", "Imports that their import token let through.", "algorithm", "result"),
		cache:    counter("key_uses_total", "Keys that the data plane asked for: hit if they were open already, miss if not.", "cache"),
		warnings: prometheus.NewCounter(prometheus.CounterOpts{Name: "keyferry_gcm_warnings_total", Help: "Warnings that a key nears the number of encryptions that AES-GCM allows."}),
		swept:    counter("swept_total", "What sweeps destroyed: keys (or their expired material) and wrapping pairs.", "what"),
		sweeps:   counter("sweeps_total", "Sweeps that came to an end.", "result"),
		sweptAt:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "keyferry_last_good_sweep_timestamp_seconds", Help: "When the last sweep ended that did all its work; 0: none has."}),
		store: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyferry_store_seconds", Buckets: latency, Help: "Calls of the database on the way of requests, and their time.",
		}, []string{"call"}),
		failures: counter("store_failures_total", "Calls of the database that failed.", "call"),
	}
	m.registry.MustRegister(m.requests, m.imports, m.cache, m.warnings, m.swept, m.sweeps, m.sweptAt, m.store, m.failures,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// answered is for kmsapi.Config.
func (m *metrics) answered(action, code string, took time.Duration) {
	m.requests.WithLabelValues(action, code).Observe(took.Seconds())
}

// The methods of engine.Observer.
var _ engine.Observer = (*metrics)(nil)

// Imported tells refused material from other failures, and no more of it.
func (m *metrics) Imported(algorithm hsm.Algorithm, err error) {
	result := "failed"
	switch {
	case err == nil:
		result = "imported"
	case errors.Is(err, engine.InvalidKeyMaterial), errors.Is(err, engine.InvalidImportToken):
		result = "refused"
	}
	m.imports.WithLabelValues(string(algorithm), result).Inc()
}

func (m *metrics) Used(cached bool) {
	result := "miss"
	if cached {
		result = "hit"
	}
	m.cache.WithLabelValues(result).Inc()
}

func (m *metrics) Warned()    { m.warnings.Inc() }
func (m *metrics) SweptKey()  { m.swept.WithLabelValues("key").Inc() }
func (m *metrics) SweptPair() { m.swept.WithLabelValues("pair").Inc() }

func (m *metrics) Swept(err error) {
	if err != nil {
		m.sweeps.WithLabelValues("failed").Inc()
		return
	}
	m.sweeps.WithLabelValues("done").Inc()
	m.sweptAt.SetToCurrentTime()
}

// watch adds what is asked for when somebody reads the metrics.
func (m *metrics) watch(e *engine.Engine, t *hsm.Token) { m.registry.MustRegister(&present{e, t}) }

// present collects the state of engine and token at one moment.
type present struct {
	engine *engine.Engine
	token  *hsm.Token
}

var (
	pairsDesc    = describe("pairs", "Wrapping pairs: ready ones, and outstanding ones, which import tokens are bound to.", "spec", "algorithm", "state")
	openDesc     = describe("open_keys", "Keys that are open in the token, and cached.")
	dueDesc      = describe("due_keys", "Keys that lose their material, or end, within 24 hours; 1000 stands for more.")
	hereDesc     = describe("token_up", "1 while the token is there, 0 while it is lost.")
	sessionsDesc = describe("token_sessions", "Sessions of the pool with the token: most, and in use.", "state")
	lostDesc     = describe("token_lost_total", "How often the token was lost.")
	backDesc     = describe("token_reopened_total", "How often it came back.")
	refusedDesc  = describe("token_refused", "1 once the token refused the PIN, or came back as another: a person must act, and restart the server.")
	residentDesc = describe("resident_objects", "Objects of the token that hold key material: there, and at most.", "state")
	memoryDesc   = describe("token_private_memory_bytes", "What the token says of its memory for private objects; missing if it says nothing.", "state")
)

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("keyferry_"+name, help, labels, nil)
}

// Describe is of prometheus.Collector.
func (*present) Describe(all chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{pairsDesc, openDesc, dueDesc, hereDesc, sessionsDesc, lostDesc, backDesc, refusedDesc, residentDesc, memoryDesc} {
		all <- d
	}
}

// Collect is of prometheus.Collector. Where the database does not answer, what
// it would have said is missing.
func (p *present) Collect(all chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value int, labels ...string) {
		all <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(value), labels...)
	}
	token := p.token.Stats()
	flag := func(d *prometheus.Desc, set bool) {
		value := 0
		if set {
			value = 1
		}
		gauge(d, value)
	}
	flag(hereDesc, token.Here)
	flag(refusedDesc, token.Refused != nil)
	gauge(sessionsDesc, token.Sessions, "most")
	gauge(sessionsDesc, token.InUse, "in use")
	all <- prometheus.MustNewConstMetric(lostDesc, prometheus.CounterValue, float64(token.Lost))
	all <- prometheus.MustNewConstMetric(backDesc, prometheus.CounterValue, float64(token.Back))

	ctx, cancel := context.WithTimeout(context.Background(), healthTimeout)
	defer cancel()
	stats, err := p.engine.Stats(ctx)
	gauge(openDesc, stats.OpenKeys)
	if stats.Room.Limit > 0 {
		gauge(residentDesc, stats.Room.Objects, "there")
		gauge(residentDesc, stats.Room.Limit, "most")
	}
	if m := stats.Room.Memory; m.Total > 0 {
		all <- prometheus.MustNewConstMetric(memoryDesc, prometheus.GaugeValue, float64(m.Free), "free")
		all <- prometheus.MustNewConstMetric(memoryDesc, prometheus.GaugeValue, float64(m.Total), "total")
	}
	if err != nil {
		return
	}
	gauge(dueDesc, stats.DueSoon)
	for _, offer := range stats.Offers {
		ready, outstanding := 0, 0
		for _, count := range stats.Pairs { // none is there of an offer without pairs
			if count.Spec == string(offer.Spec) && count.Algorithm == string(offer.Algorithm) {
				ready, outstanding = count.Ready, count.Bound
			}
		}
		gauge(pairsDesc, ready, string(offer.Spec), string(offer.Algorithm), "ready")
		gauge(pairsDesc, outstanding, string(offer.Spec), string(offer.Algorithm), "outstanding")
	}
}

// serve answers metricsPath on a port of its own until stop is called.
func (m *metrics) serve(port *boundPort, log *slog.Logger) (stop func(), err error) {
	listener, err := port.listen()
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	logger := slog.NewLogLogger(log.Handler(), slog.LevelWarn)
	mux.Handle("GET "+metricsPath, promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog: logger, MaxRequestsInFlight: 4, Timeout: 2 * healthTimeout, ErrorHandling: promhttp.ContinueOnError,
	}))
	srv := &http.Server{
		Handler: mux, ErrorLog: logger, ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 8 << 10,
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(listener) }()
	return func() {
		err := srv.Close()
		if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
			err = cmp.Or(err, served)
		}
		if err != nil {
			log.Warn("the server of metrics did not end well", slog.Any("error", err))
		}
	}, nil
}
