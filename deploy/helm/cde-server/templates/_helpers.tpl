{{- define "cde.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{- define "cde.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cde.labels" -}}
{{ include "cde.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "cde.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion (ternary "cuda" "cpu" (gt (int .Values.gpus) 0))) }}
{{- end }}

{{- define "cde.pod-security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "cde.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "cde.check" -}}
{{- if not (or .Values.keys.existingSecret .Values.allowUnauthenticated) }}
{{- fail "Nothing would check callers: set keys.existingSecret, or allowUnauthenticated=true where something in front does" }}
{{- end }}
{{- if and (not .Values.database.existingSecret) (or .Values.autoscaling.enabled (gt (int .Values.replicas) 1)) }}
{{- fail "Several replicas need one database: set database.existingSecret" }}
{{- end }}
{{- if and .Values.persistence.enabled (ne .Values.persistence.accessMode "ReadWriteMany") (or .Values.autoscaling.enabled (gt (int .Values.replicas) 1)) }}
{{- fail "Several replicas need one volume that all can write (persistence.accessMode=ReadWriteMany), or none (persistence.enabled=false)" }}
{{- end }}
{{- if not (or .Values.database.existingSecret .Values.persistence.enabled) }}
{{- fail "Contexts would be lost with the pod: set database.existingSecret or persistence.enabled" }}
{{- end }}
{{- end }}
