{{- define "fedgrpc.labels" -}}
app.kubernetes.io/part-of: fedgrpc
{{- end }}
{{- define "fedgrpc.image" -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end }}
{{- define "fedgrpc.settings" -}}
{{- range $name, $value := .Values.settings }}
FEDGRPC_AGGREGATOR_{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- if eq .Values.tls.mode "insecure" }}
FEDGRPC_AGGREGATOR_INSECURE: "true"
{{- else if eq .Values.tls.mode "own" }}
FEDGRPC_AGGREGATOR_TLS_CERT: /etc/fedgrpc/tls/tls.crt
FEDGRPC_AGGREGATOR_TLS_KEY: /etc/fedgrpc/tls/tls.key
FEDGRPC_AGGREGATOR_TLS_CA: /etc/fedgrpc/tls/ca.crt
{{- end }}
{{- if .Values.metrics.enabled }}
FEDGRPC_AGGREGATOR_METRICS_ADDRESS: 0.0.0.0:9090
{{- end }}
{{- end }}
