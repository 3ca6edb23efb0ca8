{{- define "pylon.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "pylon.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "pylon.labels" -}}
{{ include "pylon.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "pylon.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "pylon.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "pylon.operatorImage" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}

{{- define "pylon.trainerImage" -}}
{{- printf "%s:%s" .Values.trainerImage.repository (.Values.trainerImage.tag | default .Chart.AppVersion) -}}
{{- end -}}

{{/* The operator as the subject of a binding. */}}
{{- define "pylon.subjects" -}}
- kind: ServiceAccount
  name: {{ include "pylon.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}

{{/* What the operator may do where PylonJobs live: WORKLOADS of pylon_operator/permissions.py. Secrets of users are never read: only creating one is allowed. */}}
{{- define "pylon.jobRules" -}}
- apiGroups: [pylon.dev]
  resources: [pylonjobs]
  verbs: [get, list, watch, delete]
- apiGroups: [pylon.dev]
  resources: [pylonjobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# The Job controller creates the pods.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, patch, delete]
- apiGroups: [""]
  resources: [services, configmaps]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end -}}
